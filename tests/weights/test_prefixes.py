import numpy as np
import pytest

from tests import golden, small
from umae_jax.errors import UserError
from umae_jax.features import load_encoder
from umae_jax.weights.exchange import read_model
from umae_jax.weights.files import Weights, encode_weights
from umae_jax.weights.huggingface import to_huggingface
from umae_jax.weights.names import to_reference
from umae_jax.weights.prefixes import remove_prefix

NAMES = ("patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.0.norm1.weight", "norm.bias", "mask_token")
ARRAYS = {name: np.full(2, number, np.float32) for number, name in enumerate(NAMES)}


def prefixed(prefix, arrays=ARRAYS):
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module.encoder.", "a.b.c.d.", "net/", "x_", "module._orig_mod."]
)
def test_a_shared_prefix_is_removed_and_named(prefix, capsys):
    assert remove_prefix(prefixed(prefix), "x.pth") == ARRAYS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("x.pth: removed ")
    assert all(part in line for part in prefix.split("."))
    assert "left out" not in line


def test_names_without_a_prefix_are_left_alone(capsys):
    for names in (ARRAYS, {"vit." + name: array for name, array in ARRAYS.items() if "patch" not in name}, {}):
        assert remove_prefix(names, "x.pth") == names
    assert capsys.readouterr().err == ""


def test_tensors_without_the_prefix_are_left_out_and_named(capsys):
    foreign = {"optimizer.state.0.exp_avg": np.zeros(2), "epoch": np.zeros(1), **prefixed("optimizer.exp_avg.")}
    assert remove_prefix(foreign | prefixed("module."), "x.pth") == ARRAYS
    assert "left out 7 tensors: optimizer.state.0.exp_avg, epoch, " in capsys.readouterr().err


@pytest.mark.parametrize("other", ["student.", "predictor.backbone.", "ema_2."])
def test_one_of_two_models_is_read(other, capsys):
    arrays = prefixed(other, {name: array + 1 for name, array in ARRAYS.items()}) | prefixed("teacher.")
    assert remove_prefix(arrays, "x.pth") == ARRAYS
    assert "'teacher.'" in capsys.readouterr().err


def test_wrappers_of_a_part_are_removed():
    names = {name.replace("blocks.0.", "blocks.0._orig_mod."): array for name, array in ARRAYS.items()}
    assert remove_prefix(names, "x.pth") == ARRAYS
    both = ARRAYS | {"blocks.0._orig_mod.norm1.weight": np.zeros(2)}
    assert remove_prefix(both, "x.pth") == both  # two names would become one


@pytest.mark.parametrize("prefix", ["module.", "module.vit."])
@pytest.mark.parametrize("layout", ["vit_mae", "vit"])
def test_the_names_of_transformers_may_have_a_prefix_too(layout, prefix):
    config = golden.config_of("vit_um")
    tensors = to_huggingface(layout, to_reference(config, small.random_model(config)[1]))
    removed = remove_prefix(prefixed(prefix, tensors), "x.safetensors")
    expected = prefixed("vit.", tensors) if (layout, prefix) == ("vit", "module.vit.") else tensors
    assert list(removed) == list(expected)


@pytest.mark.parametrize("kind", ["swin_um_window8", "pvt_um", "vit_classifier", "simmim_swin"])
def test_a_model_with_prefixed_names_loads(kind, tmp_path):
    config = golden.config_of(kind)
    tensors = to_reference(config, small.random_model(config)[1])
    path = tmp_path / "prefixed.safetensors"
    path.write_bytes(encode_weights(path.suffix, Weights(prefixed("module.model.", tensors), {})))
    assert read_model(path, config).tensors.keys() == tensors.keys()
    if kind == "swin_um_window8":
        assert load_encoder(path).widths == config.model.widths


def test_a_model_without_its_patch_embedding_is_not_called_another_architecture(tmp_path):
    config = golden.config_of("swin_um_window8")
    tensors = to_reference(config, small.random_model(config)[1])
    del tensors["patch_embed.proj.weight"]
    path = tmp_path / "cut.safetensors"
    path.write_bytes(encode_weights(path.suffix, Weights(tensors, {})))
    with pytest.raises(UserError, match=r"holds a swin without 'patch_embed.proj.weight'"):
        read_model(path)
