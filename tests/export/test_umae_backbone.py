"""The PyTorch file gives the same maps as the JAX encoder, and needs only torch."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

import umae_jax
from tests import golden, small
from tests.runs import store
from umae_jax.weights.exchange import BACKBONE, export_weights
from umae_jax.weights.files import Weights, encode_weights, read_weights

torch = pytest.importorskip("torch")

from umae_jax.export import umae_backbone  # noqa: E402 - it needs torch


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that exports a model of a kind and returns the file."""
    folder, files = tmp_path_factory.mktemp("exported"), {}

    def export(kind, suffix=".safetensors"):
        if (kind, suffix) not in files:
            config = golden.config_of(kind)
            run = folder / kind
            if not run.exists():
                store(run, config, small.random_model(config)[1])
            files[kind, suffix] = folder / f"{kind}{suffix}"
            export_weights(run, files[kind, suffix], "reference")
        return files[kind, suffix]

    return export


def images_of(height, width):
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


def maps_in_torch(backbone, images):
    with torch.no_grad():
        maps = backbone(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    return [stage.numpy().transpose(0, 2, 3, 1) for stage in maps]


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (96, 224)])
@pytest.mark.parametrize("kind", small.PYRAMIDS)
def test_every_stage_equals_that_of_the_jax_encoder(exported, kind, size):
    file = exported(kind)
    images = images_of(*size)
    backbone, encoder = umae_backbone.load_backbone(file), umae_jax.load_encoder(file)
    assert (backbone.widths, backbone.strides) == (encoder.widths, encoder.strides)
    assert (backbone.mean, backbone.std) == (encoder.mean, encoder.std)
    for theirs, ours in zip(maps_in_torch(backbone, images), encoder(images), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_other_windows_give_equal_maps(exported):
    file, images = exported("swin_um_window8"), images_of(96, 160)
    backbone, encoder = umae_backbone.load_backbone(file, window=10), umae_jax.load_encoder(file, window=10)
    for theirs, ours in zip(maps_in_torch(backbone, images), encoder(images), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_a_file_with_old_configuration_keys_is_read(exported, tmp_path):
    file = exported("pvt_um")
    tensors, metadata = read_weights(file)
    metadata["config"] = metadata["config"].replace("sr_ratios", "reductions")
    (tmp_path / "old.safetensors").write_bytes(encode_weights(".safetensors", Weights(tensors, metadata)))
    old, new = (umae_backbone.load_backbone(path) for path in (tmp_path / "old.safetensors", file))
    assert [block.attn.sr_ratio for block in old.blocks] == [block.attn.sr_ratio for block in new.blocks]


@pytest.mark.parametrize("kind", ["swin_um_window8", "pvt_um"])
def test_image_sizes_that_no_stride_divides_give_maps_rounded_up(exported, kind):
    backbone = umae_backbone.load_backbone(exported(kind))
    images = images_of(97, 130)
    padded = np.pad(images, ((0, 0), (0, 31), (0, 30), (0, 0)))
    maps, padded_maps = maps_in_torch(backbone, images), maps_in_torch(backbone, padded)
    assert [stage.shape[1:3] for stage in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]
    for stage, larger in zip(maps, padded_maps, strict=True):
        np.testing.assert_allclose(stage, larger[:, : stage.shape[1], : stage.shape[2]], atol=1e-5)


@pytest.mark.parametrize("kind", ["swin_classifier", "pvt_classifier"])
def test_logits_equal_those_of_the_reference(exported, kind, tmp_path):
    numbers = golden.load(kind)
    store(tmp_path / "run", golden.config_of(kind), nnx.state(golden.model_of(kind), nnx.Param))
    export_weights(tmp_path / "run", tmp_path / "weights.pth", "reference")
    backbone = umae_backbone.load_backbone(tmp_path / "weights.pth")
    mean = torch.from_numpy(maps_in_torch(backbone, numbers["images"])[-1].mean((1, 2)))
    head = {name: torch.from_numpy(array) for name, array in golden.part(numbers, "param").items()}
    normed = torch.nn.functional.layer_norm(mean, mean.shape[1:], head["fc_norm.weight"], head["fc_norm.bias"], 1e-6)
    logits = torch.nn.functional.linear(normed, head["head.weight"], head["head.bias"])
    np.testing.assert_allclose(logits, numbers["logits"], atol=1e-4)


def test_the_file_needs_only_torch(exported, tmp_path):
    """Run a copy in a process that cannot import our packages."""
    file = exported("swin_um_window8", ".pth")
    assert (file.parent / BACKBONE.name).read_bytes() == BACKBONE.read_bytes()
    shutil.copy(BACKBONE, tmp_path)
    program = f"""
import sys, torch
for name in ("umae_jax", "jax", "flax", "numpy", "safetensors"):
    sys.modules.pop(name, None)
    sys.modules[name] = None
from umae_backbone import load_backbone
print([tuple(stage.shape) for stage in load_backbone({str(file)!r})(torch.zeros(1, 3, 64, 64))])
print([tuple(stage.shape) for stage in load_backbone({str(exported("swin_um_window8"))!r})(torch.zeros(1, 3, 64, 64))])
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[(1, 16, 16, 16), (1, 32, 8, 8), (1, 64, 4, 4), (1, 128, 2, 2)]"] * 2


def test_training_drops_paths_and_has_gradients(exported):
    backbone = umae_backbone.load_backbone(exported("swin_um_window8"), drop_path=0.9).train()
    images = torch.from_numpy(images_of(64, 64).transpose(0, 3, 1, 2).copy())
    first, second = backbone(images), backbone(images)
    assert not torch.equal(first[-1], second[-1])
    sum(stage.sum() for stage in first).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:20], "not a complete safetensors file"),
        (lambda data: data[:-8], "not a complete safetensors file"),
        (
            lambda data: data.replace(b"blocks.1.norm1.bias", b"blocks.1.norm9.bias"),
            "Missing .*blocks.1.norm1.bias.*Unexpected .*norm9",
        ),
        (lambda data: data.replace(b"__metadata__", b"__metabata__"), "not a complete safetensors file"),
    ],
)
def test_a_file_that_does_not_fit_is_rejected(exported, tmp_path, change, message):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(change(exported("swin_um_window8").read_bytes()))
    with pytest.raises(ValueError, match=message):
        umae_backbone.load_backbone(path)


def test_a_vit_is_rejected(exported):
    with pytest.raises(ValueError, match=r"'vit'.*transformers"):
        umae_backbone.load_backbone(exported("vit_um"))
