import json
from pathlib import Path

import pytest

from tests import golden, small
from umae_jax.errors import UserError
from umae_jax.weights.exchange import read_model
from umae_jax.weights.files import Weights, encode_weights
from umae_jax.weights.names import to_reference

OLD_CONFIGS = json.loads(Path(__file__).with_name("old_configs.json").read_text())  # written by commit 3ccc3fa


def write(path, kind, **metadata):
    tensors = to_reference(golden.config_of(kind), small.random_model(golden.config_of(kind))[1])
    path.write_bytes(encode_weights(path.suffix, Weights(tensors, metadata)))


def test_metadata_with_old_configuration_keys_is_read(tmp_path):
    write(tmp_path / "pvt.safetensors", "pvt_classifier", config=json.dumps(OLD_CONFIGS["pvt_classifier"]))
    config, tensors, classes = read_model(tmp_path / "pvt.safetensors")
    assert classes == tuple(f"class {number}" for number in range(10))
    assert config.model.sr_ratios == (4, 4, 2, 1)
    assert (config.grad_accum_steps, config.optimizer.ema_decay) == (2, 0.999)
    assert tensors["head.weight"].shape == (10, 48)


def test_metadata_with_old_keys_of_a_masked_autoencoder_is_read(tmp_path):
    kind = "swin_um_window4_no_secondary"
    write(tmp_path / "swin.safetensors", kind, config=json.dumps(OLD_CONFIGS[kind]))
    config, _, classes = read_model(tmp_path / "swin.safetensors")
    assert classes == ()
    assert config.model.norm_pix_loss is False
    assert config.model.to_dict() == golden.config_of(kind).model.to_dict()


@pytest.mark.parametrize("classes", ["[1", "7", "null"])
def test_invalid_class_names_are_rejected(tmp_path, classes):
    write(tmp_path / "pvt.safetensors", "pvt_classifier", classes=classes)
    with pytest.raises(UserError, match=r"pvt.safetensors.*classes"):
        read_model(tmp_path / "pvt.safetensors")


def test_an_invalid_configuration_is_rejected(tmp_path):
    write(tmp_path / "swin.safetensors", "swin_um_window8", config="{}")
    with pytest.raises(UserError, match=r"swin.safetensors.*configuration"):
        read_model(tmp_path / "swin.safetensors")
