import functools
import json
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import umae_jax
from tests import golden, small
from tests.images import picture
from tests.runs import store
from umae_jax.config import default_config
from umae_jax.data.on_device import normalize
from umae_jax.errors import UserError
from umae_jax.weights.exchange import export_weights, import_weights
from umae_jax.weights.files import Weights, encode_weights, read_weights
from umae_jax.weights.names import to_reference


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
    export_weights(runs(kind), tmp_path / f"weights{suffix}", "reference")
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


def test_a_vit_of_another_architecture_is_refused(tmp_path):
    """Its names are those of ours, and some more."""
    config = default_config("vit_small", "classifier")
    config.model.classes = 5
    names = to_reference(config, small.random_model(config)[1])
    np.savez(tmp_path / "ours.npz", **names)
    assert umae_jax.load_encoder(tmp_path / "ours.npz").module.norm is None
    np.savez(tmp_path / "scaled.npz", **names, **{"blocks.0.ls1.gamma": np.ones(384)})
    with pytest.raises(UserError, match=r"1 unexpected: blocks.0.ls1.gamma"):
        umae_jax.load_encoder(tmp_path / "scaled.npz")
    # Some norm the tokens, and not their mean: then the map is normed.
    normed = {name: array for name, array in names.items() if not name.startswith("fc_norm")}
    np.savez(tmp_path / "normed.npz", **normed, **{"norm.weight": np.ones(384), "norm.bias": np.zeros(384)})
    encoder = umae_jax.load_encoder(tmp_path / "normed.npz")
    (stage,) = encoder(images_of(32, 32))
    np.testing.assert_allclose(stage.mean(-1), 0, atol=1e-5)


def test_what_transformers_saved_is_read_from_its_folder(runs, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    export_weights(runs("vit_random"), tmp_path / "ours" / "model.safetensors", "vit_mae")
    transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"a vit of widths \(32,\) and depths \(2,\), whose heads no shape tells"):
        umae_jax.load_encoder(tmp_path / "theirs")
    import_weights(tmp_path / "theirs" / "model.safetensors", tmp_path / "run", config=golden.config_of("vit_random"))
    ours, theirs = (
        umae_jax.load_encoder(path)(images_of(64, 64))[0] for path in (runs("vit_random"), tmp_path / "run")
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.patch", 0),
        ("model.widths", ["a", "b"]),
        ("model.widths", [0, 0]),
        ("model.method", "xx"),
        ("image_size", [32]),
        ("data.mean", ["a", "b", "c"]),
        ("data.std", [0, 0, 0]),
        ("dtype", "int7"),
        ("seed", -1),
    ],
)
def test_a_file_whose_configuration_cannot_be_is_told(runs, tmp_path, key, value):
    export_weights(runs("swin_um_window8"), tmp_path / "swin.safetensors")
    tensors, metadata = read_weights(tmp_path / "swin.safetensors")
    config = json.loads(metadata["config"])
    *parents, last = key.split(".")
    functools.reduce(getitem, parents, config)[last] = value
    data = encode_weights(".safetensors", Weights(tensors, {"config": json.dumps(config)}))
    (tmp_path / "swin.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"swin.safetensors names a model that this program does not know") as told:
        umae_jax.load_encoder(tmp_path / "swin.safetensors")
    assert "\n" not in str(told.value)


def test_bfloat16_follows_float32(runs):
    images = images_of(64, 64)
    single, half = (umae_jax.load_encoder(runs("vit_um"), dtype=dtype)(images)[0] for dtype in ("float32", "bfloat16"))
    assert np.corrcoef(np.ravel(single), np.ravel(half))[0, 1] > 0.99


def test_what_is_no_image_is_told_in_one_sentence(runs):
    encoder = umae_jax.load_encoder(runs("swin_um_window8"))
    with pytest.raises(UserError, match=r"height 50 is not a multiple of 32 .* choose 32 or 64"):
        encoder(images_of(50, 64))
    with pytest.raises(UserError, match=r"\[batch, height, width, 3\], one at least, not \[64"):
        encoder(images_of(64, 64)[0])
    with pytest.raises(UserError, match=r"one at least, not \[0, 64"):
        encoder(images_of(64, 64)[:0])
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
