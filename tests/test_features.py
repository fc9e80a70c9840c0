import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import umae_jax
from tests import golden, small
from tests.images import picture
from tests.runs import store
from umae_jax.data.on_device import normalize
from umae_jax.errors import UserError
from umae_jax.weights.exchange import take_out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a kind of model to the directory of a run of it."""
    folder = tmp_path_factory.mktemp("runs")

    def run(kind):
        if not (folder / kind).exists():
            config = golden.config_of(kind)
            store(folder / kind, config, small.random_model(config)[1])
        return folder / kind

    return run


def images_of(height, width):
    return np.stack([picture(seed, height, width) for seed in range(2)])


@pytest.mark.parametrize("kind", small.KINDS)
def test_every_kind_of_run_gives_the_maps_of_its_own_encoder(runs, kind):
    config = golden.config_of(kind)
    graph, params = small.random_model(config)
    module = nnx.merge(graph, params).encoder
    images = images_of(64, 128)
    encoder = umae_jax.load_encoder(runs(kind))
    maps = encoder(images)
    normalised = normalize(jnp.asarray(images), config.data.mean, config.data.std)
    direct = jax.jit(lambda module, images: module(module.embed(images)).maps)(module, normalised)
    assert len(maps) == len(encoder.widths) == len(encoder.strides)
    for stage, expected, width, stride in zip(maps, direct, encoder.widths, encoder.strides, strict=True):
        assert stage.shape == (2, 64 // stride, 128 // stride, width)
        np.testing.assert_allclose(stage, expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["swin_um_window8", "simmim_pvt", "vit_classifier"])
def test_an_exported_file_gives_the_same(runs, kind, suffix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    take_out(runs(kind), tmp_path / f"weights{suffix}", "reference")
    ours, theirs = (umae_jax.load_encoder(path) for path in (runs(kind), tmp_path / f"weights{suffix}"))
    for stage, other in zip(ours(images_of(64, 64)), theirs(images_of(64, 64)), strict=True):
        np.testing.assert_array_equal(stage, other)


def test_floating_point_images_are_normalised_already(runs):
    encoder = umae_jax.load_encoder(runs("pvt_um"))
    images = images_of(64, 64)
    normalised = (images / 255 - encoder.mean) / encoder.std
    for stage, other in zip(encoder(images), encoder(normalised.astype(np.float32)), strict=True):
        np.testing.assert_allclose(stage, other, atol=1e-3)


def test_windows_may_be_larger_and_need_not_tile_the_image(runs):
    """One window as large as the image, or larger: the same global attention."""
    images = images_of(96, 96)  # 24 x 24 tokens, which windows of 8 tile and those of 10 do not
    shapes = [(2, 24, 24, 16), (2, 12, 12, 32), (2, 6, 6, 64), (2, 3, 3, 128)]
    maps = {window: umae_jax.load_encoder(runs("swin_um_window8"), window=window)(images) for window in (8, 10, 24, 30)}
    assert all([stage.shape for stage in stages] == shapes for stages in maps.values())
    np.testing.assert_array_equal(maps[24][-1], maps[30][-1])
    assert not np.allclose(maps[8][0], maps[10][0])


def test_bfloat16_follows_float32(runs):
    images = images_of(64, 64)
    single, half = (umae_jax.load_encoder(runs("vit_um"), dtype=dtype)(images)[0] for dtype in ("float32", "bfloat16"))
    assert np.corrcoef(np.ravel(single), np.ravel(half))[0, 1] > 0.99


def test_what_is_no_image_is_told_in_one_sentence(runs):
    encoder = umae_jax.load_encoder(runs("swin_um_window8"))
    with pytest.raises(UserError, match=r"height 50 is not a multiple of 32 .* choose 32 or 64"):
        encoder(images_of(50, 64))
    with pytest.raises(UserError, match=r"\[batch, height, width, 3\], not \[64, 64, 3\]"):
        encoder(images_of(64, 64)[0])
    with pytest.raises(UserError, match="must be uint8 from 0 to 255, or floating point"):
        encoder(images_of(64, 64).astype(np.int32))


def test_what_holds_no_weights_is_told_in_one_sentence(runs, tmp_path):
    with pytest.raises(UserError, match=r"there is no file or directory .*nowhere"):
        umae_jax.load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no run: there is no config.json"):
        umae_jax.load_encoder(tmp_path)
    with pytest.raises(UserError, match="a pvt has no windows"):
        umae_jax.load_encoder(runs("pvt_um"), window=8)
    with pytest.raises(UserError, match="must be an even number"):
        umae_jax.load_encoder(runs("swin_um_window8"), window=7)
    with pytest.raises(UserError, match="dtype must be float32 or bfloat16"):
        umae_jax.load_encoder(runs("pvt_um"), dtype="float16")
