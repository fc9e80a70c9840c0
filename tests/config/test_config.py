import functools
import importlib.util
from operator import getitem
from pathlib import Path

import pytest
from flax import nnx

from umae_jax.config import check, default_config, differences, read_config, resolve_steps, to_json
from umae_jax.errors import UserError
from umae_jax.models import presets
from umae_jax.models.build import build_model

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.py") if "def get_config" in path.read_text())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds_and_survives_json(path, tmp_path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    check(config)
    if config.model.method == "classifier":
        config.model.classes = config.model.classes or 2
    nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    written = tmp_path / "config.json"
    written.write_text(to_json(config))
    assert read_config(written).to_dict() == config.to_dict()
    assert f"--config {path.relative_to(ROOT)}" in module.__doc__


def test_steps_win_over_examples_and_examples_over_epochs():
    config = default_config()
    assert resolve_steps(config, "total", 1000, 50) == 4000
    config.total_examples = 500
    assert resolve_steps(config, "total", 1000, 50) == 10
    config.total_steps = 3
    assert resolve_steps(config, "total", 1000, 50) == 3
    assert resolve_steps(config, "optimizer.warmup", 1000, 50) == 200


def test_differences_name_the_nested_key():
    old, new = default_config(), default_config()
    new.model.widths = (192, 384, 768, 1536)
    new.seed = 1
    assert differences(old, new) == {"model.widths": ((96, 192, 384, 768), (192, 384, 768, 1536)), "seed": (0, 1)}


@pytest.mark.parametrize("data", [b"", b"[]", b'{"model": {"no_such_key": 1}}', b'{"seed": "one"}', b"\x80\xff"])
def test_a_file_that_is_no_configuration_is_told(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"config.json is not a configuration that this program wrote"):
        read_config(path)


def written_without(key, folder):
    """The file of a default configuration that lacks a key."""
    config = default_config().unlock()
    *parents, last = key.split(".")
    del functools.reduce(getitem, parents, config)[last]
    path = folder / "config.json"
    path.write_text(to_json(config))
    return path


@pytest.mark.parametrize("key", ["image_size", "model.method", "model.widths"])
def test_a_file_that_lacks_a_part_of_the_model_is_told(tmp_path, key):
    """It is never filled in with a default."""
    last = key.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"not a configuration that this program wrote \({last} missing\)"):
        read_config(written_without(key, tmp_path))


@pytest.mark.parametrize("key", ["grad_accum_steps", "augment", "probe.stage"])
def test_what_an_earlier_version_did_not_write_takes_its_default(tmp_path, key):
    assert read_config(written_without(key, tmp_path)).to_dict() == default_config().to_dict()


@pytest.mark.parametrize(
    ("size", "method"), [(size, method) for size in presets.SIZES for method in presets.methods_of(size)]
)
def test_every_preset_passes_the_check_and_survives_json(tmp_path, size, method):
    config = default_config(size, method)
    check(config)
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert read_config(path).to_dict() == config.to_dict()


def test_a_configuration_that_misses_keys_is_told():
    config = default_config().unlock()
    del config.grad_accum_steps
    with pytest.raises(UserError, match="grad_accum_steps: missing"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 12, "12 does not divide among 8 devices; choose a multiple of 8, such as 16"),
        ("grad_accum_steps", 3, "8 devices x 3 accumulated parts; choose a multiple of 24"),
        ("mesh.fsdp", 3, "3 does not divide the 8 devices"),
        ("dtype", "float16", "dtype must be float32 or bfloat16"),
        ("rematerialize", "all", "rematerialize must be one of none, pairs, blocks, not 'all'"),
        ("fused_attention", None, "fused_attention must be True or False, not None"),
        ("image_size", (64,), "image_size is height and width"),
        ("model.method", "um", "model.method: 'um' is none of um_mae, mae, simmim, classifier"),
        ("model.encoder", "resnet", "model.encoder: 'resnet' is none of swin, pvt, vit"),
        ("data.mean", ("a", "b", "c"), "data.mean must be numbers"),
        ("model.channels", 1, "data.mean names 3 channels, model.channels is 1"),
        ("data.area", 0.0, r"data.area must lie in \(0, 1\]"),
        ("data.std", (0.0, 0.1, 0.1), "data.std must be above 0"),
        ("log_every", 0, "log_every must be a whole number from 1, not 0"),
        ("model.patch", -4, "model.patch must be a whole number from 1"),
        ("model.depths", (1.5, 2), "model.depths must be whole numbers from 1"),
        ("model.widths", (96, 0), "model.widths must be whole numbers from 1"),
        ("model.mlp_ratios", (4.0, 4.0), "model.mlp_ratios must be whole numbers from 1"),
        ("model.sr_ratios", (0, 1), "model.sr_ratios must be whole numbers from 1"),
        ("model.classes", 1, "model.classes must be a whole number from 2"),
        ("probe.stage", 4, "there are 4 stages, from 0 to 3, or -1 for the last; not 4"),
        ("augment.erase", 1.5, r"augment.erase must lie in"),
        ("augment.magnitude", 11.0, "augment.magnitude goes from 0 to 10"),
        ("augment.mixup", -1.0, "augment.mixup must be 0 or above"),
        ("augment.label_smoothing", 1.0, r"augment.label_smoothing must lie in"),
        ("optimizer.layer_decay", 0.0, r"optimizer.layer_decay must lie in"),
        ("optimizer.ema_decay", 1.0, r"optimizer.ema_decay must lie in"),
        ("validation.crop", 0.0, r"validation.crop must lie in"),
        ("model.drop_path", 1.0, r"model.drop_path must lie in \[0, 1\)"),
        ("image_size", (32.0, 32.0), "image_size must be whole numbers from 1"),
        ("seed", -1, "seed must lie in 0"),
        ("seed", 2**40, "seed must lie in 0"),
        ("optimizer.clip_norm", 0.0, "optimizer.clip_norm must be above 0"),
        ("optimizer.beta1", 2.0, r"optimizer.beta1 must lie in \[0, 1\)"),
    ],
)
def test_wrong_values_are_named_with_what_to_write(key, value, message):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        check(config)
