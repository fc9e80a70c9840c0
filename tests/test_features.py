import functools
import json
import subprocess
import sys
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
from umae_jax.errors import UserError
from umae_jax.tasks.importing import import_weights
from umae_jax.weights.exchange import export_weights
from umae_jax.weights.files import Weights, encode_weights, read_weights
from umae_jax.weights.names import to_reference


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that stores a run with a model of a kind."""
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
def test_an_encoder_loaded_from_a_run_gives_the_maps_of_the_runs_encoder(runs, kind):
    config = golden.config_of(kind)
    graph, params = small.random_model(config)
    module = nnx.merge(graph, params).encoder
    images = images_of(64, 128)
    encoder = umae_jax.load_encoder(runs(kind))
    maps = encoder(images)
    direct = jax.jit(lambda module, images: module(module.embed(images)).maps)(module, jnp.asarray(images))
    assert len(maps) == len(encoder.widths) == len(encoder.strides)
    for stage, expected, width, stride in zip(maps, direct, encoder.widths, encoder.strides, strict=True):
        assert stage.shape == (2, 64 // stride, 128 // stride, width)
        np.testing.assert_allclose(stage, expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["swin_um_window8", "simmim_pvt", "vit_classifier"])
def test_an_encoder_loaded_from_an_exported_file_gives_the_same_maps(runs, kind, suffix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    export_weights(runs(kind), tmp_path / f"weights{suffix}", "reference")
    ours, theirs = (umae_jax.load_encoder(path) for path in (runs(kind), tmp_path / f"weights{suffix}"))
    for stage, other in zip(ours(images_of(64, 64)), theirs(images_of(64, 64)), strict=True):
        np.testing.assert_array_equal(stage, other)


def test_floating_point_images_are_not_normalised_again(runs):
    encoder = umae_jax.load_encoder(runs("pvt_um"))
    images = images_of(64, 64)
    normalised = (images / 255 - encoder.mean) / encoder.std
    for stage, other in zip(encoder(images), encoder(normalised.astype(np.float32)), strict=True):
        np.testing.assert_allclose(stage, other, atol=1e-3)


def test_windows_can_be_larger_and_need_not_tile_the_image(runs):
    """A window as large as the image and a larger one are the same global attention."""
    images = images_of(96, 96)  # 24 x 24 tokens, which windows of 8 tile and those of 10 do not
    shapes = [(2, 24, 24, 16), (2, 12, 12, 32), (2, 6, 6, 64), (2, 3, 3, 128)]
    maps = {window: umae_jax.load_encoder(runs("swin_um_window8"), window=window)(images) for window in (8, 10, 24, 30)}
    assert all([stage.shape for stage in stages] == shapes for stages in maps.values())
    np.testing.assert_array_equal(maps[24][-1], maps[30][-1])
    assert not np.allclose(maps[8][0], maps[10][0])


def test_a_vit_with_additional_parameters_is_rejected(tmp_path):
    config = default_config("vit_small", "classifier")
    config.model.classes = 5
    names = to_reference(config, small.random_model(config)[1])
    np.savez(tmp_path / "ours.npz", **names)
    assert umae_jax.load_encoder(tmp_path / "ours.npz").module.norm is None
    np.savez(tmp_path / "scaled.npz", **names, **{"blocks.0.ls1.gamma": np.ones(384)})
    with pytest.raises(UserError, match=r"1 unexpected: blocks.0.ls1.gamma"):
        umae_jax.load_encoder(tmp_path / "scaled.npz")
    # Others normalise tokens instead of their mean; then the map is normalised.
    normed = {name: array for name, array in names.items() if not name.startswith("fc_norm")}
    np.savez(tmp_path / "normed.npz", **normed, **{"norm.weight": np.ones(384), "norm.bias": np.zeros(384)})
    encoder = umae_jax.load_encoder(tmp_path / "normed.npz")
    (stage,) = encoder(images_of(32, 32))
    np.testing.assert_allclose(stage.mean(-1), 0, atol=1e-5)


def test_a_folder_saved_by_transformers_is_read(runs, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    export_weights(runs("vit_random"), tmp_path / "ours" / "model.safetensors", "vit_mae")
    transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"a vit of widths \(32,\) and depths \(2,\).* heads"):
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
def test_a_file_with_an_invalid_configuration_is_rejected(runs, tmp_path, key, value):
    export_weights(runs("swin_um_window8"), tmp_path / "swin.safetensors")
    tensors, metadata = read_weights(tmp_path / "swin.safetensors")
    config = json.loads(metadata["config"])
    *parents, last = key.split(".")
    functools.reduce(getitem, parents, config)[last] = value
    data = encode_weights(".safetensors", Weights(tensors, {"config": json.dumps(config)}))
    (tmp_path / "swin.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"swin.safetensors.*configuration") as raised:
        umae_jax.load_encoder(tmp_path / "swin.safetensors")
    assert "\n" not in str(raised.value)


def test_bfloat16_maps_follow_float32_maps(runs):
    images = images_of(64, 64)
    single, half = (umae_jax.load_encoder(runs("vit_um"), dtype=dtype)(images)[0] for dtype in ("float32", "bfloat16"))
    assert np.corrcoef(np.ravel(single), np.ravel(half))[0, 1] > 0.99


def test_invalid_images_are_rejected(runs):
    encoder = umae_jax.load_encoder(runs("swin_um_window8"))
    with pytest.raises(UserError, match=r"height 50 .*32 or 64"):
        encoder(images_of(50, 64))
    with pytest.raises(UserError, match=r"\[batch, height, width, 3\].* not \[64"):
        encoder(images_of(64, 64)[0])
    with pytest.raises(UserError, match=r"not empty, not \[0, 64"):
        encoder(images_of(64, 64)[:0])
    with pytest.raises(UserError, match=r"images .*int32"):
        encoder(images_of(64, 64).astype(np.int32))


def test_paths_without_weights_and_invalid_arguments_are_rejected(runs, tmp_path):
    with pytest.raises(UserError, match=r"no file .*nowhere"):
        umae_jax.load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json"):
        umae_jax.load_encoder(tmp_path)
    with pytest.raises(UserError, match=r"window.*pvt"):
        umae_jax.load_encoder(runs("pvt_um"), window=8)
    with pytest.raises(UserError, match=r"window.*7"):
        umae_jax.load_encoder(runs("swin_um_window8"), window=7)
    with pytest.raises(UserError, match=r"dtype.*float16"):
        umae_jax.load_encoder(runs("pvt_um"), dtype="float16")


def test_loading_an_encoder_imports_neither_training_nor_planning_nor_pallas(runs, tmp_path):
    export_weights(runs("swin_um_window8"), tmp_path / "swin.safetensors")
    code = f"""
import sys
import umae_jax
for path in {[str(runs("swin_um_window8")), str(tmp_path / "swin.safetensors")]}:
    umae_jax.load_encoder(path)
rooms = "training", "tasks", "planning", "benchmarking"
above = [name for name in sys.modules if name.startswith(tuple(f"umae_jax.{{room}}" for room in rooms))]
print(above + [name for name in sys.modules if "pallas" in name and not name.startswith(("jax._src", "jax.extend"))])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
