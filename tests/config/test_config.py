"""Configurations: defaults, checks, JSON of this version and of earlier ones."""

import functools
import json
import re
from operator import getitem
from pathlib import Path

import jax
import pytest
from flax import nnx

from tests.rngs import ConstantRngs
from umae_jax import list_models
from umae_jax.config import (
    METHODS,
    check,
    default_config,
    differences,
    flat,
    from_json,
    load_config,
    old_class_names,
    read_config,
    resolve_steps,
    steps_of_epochs,
    to_json,
)
from umae_jax.config.__main__ import describe_keys
from umae_jax.config.base import Key, Method, integer
from umae_jax.config.common import REMATERIALIZE
from umae_jax.config.load import explain_key
from umae_jax.errors import UserError
from umae_jax.models import kernels
from umae_jax.tasks import make_task

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.py") if "def get_config" in path.read_text())
PRESETS = [(size, method) for size, methods in list_models().items() for method in methods]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_bundled_configuration_loads_by_name_builds_and_survives_json(path):
    name = str(path.relative_to(ROOT / "configs").with_suffix(""))
    config = load_config(name)
    config.batch_size = max(config.batch_size, jax.device_count())
    check(config)
    task = make_task(config.copy_and_resolve_references().unlock())
    task.assume_data()
    nnx.eval_shape(lambda: task.build_model(ConstantRngs()))
    assert from_json(to_json(config)).to_dict() == config.to_dict()
    assert re.search(rf"--config {name}\b", path.read_text())


@pytest.mark.parametrize(("size", "method"), PRESETS)
def test_every_preset_passes_the_check_survives_json_and_is_documented(size, method):
    config = default_config(size, method)
    check(config)
    assert from_json(to_json(config)).to_dict() == config.to_dict()
    page = describe_keys()
    assert [key for key in flat(config) if f"`{key}`" not in page] == []


def test_a_model_has_only_the_keys_of_its_encoder_and_method():
    common = {"method", "encoder", "channels", "patch", "widths", "depths", "heads", "mlp_ratios"}
    decoder = {"decoder_factor", "norm_pix_loss"}
    expected = {
        ("swin_tiny", "classifier"): {"window", "position_width", "classes", "drop_path"},
        ("pvt_tiny", "simmim"): {"sr_ratios", *decoder},
        ("vit_base", "simmim"): decoder,
    }
    for (size, method), keys in expected.items():
        assert set(default_config(size, method).model) == common | keys
    assert "augment" not in default_config()
    assert "layer_decay" not in default_config().optimizer
    classifier = default_config("vit_base", "classifier")
    assert "augment" in classifier
    assert "layer_decay" in classifier.optimizer


def test_a_method_defined_elsewhere_brings_its_own_keys(monkeypatch):
    monkeypatch.setitem(
        METHODS,
        "color",
        Method("mean color", "color", {"color.bins": Key(3, "bins", integer(1))}, lambda *_: {"batch_size": 8}),
    )
    config = default_config("vit_small", "color")
    assert (config.color.bins, config.batch_size) == (3, 8)
    check(config)
    config.color.bins = 0
    with pytest.raises(UserError, match=r"color\.bins.*0"):
        check(config)


def test_the_rematerialization_policies_are_those_of_the_kernels():
    assert tuple(kernels.REMATERIALIZE) == REMATERIALIZE


def test_the_page_of_all_keys_is_up_to_date():
    """Else run python -m umae_jax.config > docs/configuration.md."""
    assert (ROOT / "docs" / "configuration.md").read_text() == describe_keys() + "\n"


def test_steps_take_precedence_over_examples_and_examples_over_epochs():
    config = default_config()
    assert resolve_steps(config, "total", 1000, 50) == 4000
    config.total_examples = 500
    assert resolve_steps(config, "total", 1000, 50) == 10
    config.total_steps = 3
    assert resolve_steps(config, "total", 1000, 50) == 3
    assert resolve_steps(config, "optimizer.warmup", 1000, 50) == 200
    config.optimizer.warmup_epochs = None
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps"):
        resolve_steps(config, "optimizer.warmup", 1000, 50)


def test_an_interval_is_at_least_one_step_or_never():
    assert [steps_of_epochs(epochs, 1000, 100) for epochs in (0.0, 0.001, 2.0)] == [0, 1, 20]


def test_differences_name_the_dotted_key():
    old, new = default_config(), default_config()
    new.model.widths = (192, 384, 768, 1536)
    new.seed = 1
    assert differences(old, new) == {"model.widths": ((96, 192, 384, 768), (192, 384, 768, 1536)), "seed": (0, 1)}


# Reading files.


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"3", b'{"model": {"no_such_key": 1}}', b'{"seed": "one"}', b"\x80\xff"),
        to_json(default_config()).replace('"seed": 0', '"seed": "one"').encode(),
        to_json(default_config()).replace('"seed": 0', '"seeed": 0').encode(),
        to_json(default_config()).replace("um_mae", "dino").encode(),
    ],
)
def test_a_file_that_is_not_a_configuration_is_rejected(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"config\.json is not a configuration"):
        read_config(path)


def json_without(key, config):
    """Return the JSON of a configuration that lacks a key."""
    config = config.unlock()
    *parents, last = key.split(".")
    del functools.reduce(getitem, parents, config)[last]
    return to_json(config)


@pytest.mark.parametrize("key", ["image_size", "dtype", "model.method", "model.widths", "model.window"])
def test_a_missing_key_of_the_model_takes_no_default(key):
    with pytest.raises(ValueError, match=key):
        from_json(json_without(key, default_config()))


@pytest.mark.parametrize(
    ("key", "method"),
    [("grad_accum_steps", "um_mae"), ("probe", "um_mae"), ("probe.stage", "um_mae"), ("augment", "classifier")],
)
def test_other_missing_keys_take_their_defaults(key, method):
    config = default_config("swin_tiny", method)
    assert from_json(json_without(key, default_config("swin_tiny", method))).to_dict() == config.to_dict()


def old_file(name):
    """Return a config.json that version 0.1.0 wrote."""
    return (Path(__file__).parent / f"{name}_0.1.0.json").read_bytes()


def test_the_configuration_of_an_old_pretraining_run_reads():
    text = old_file("quickstart")
    config = from_json(text)
    expected = load_config("quickstart")
    assert differences(expected, config) == {
        "checkpoint_every": (200, 50),
        "checkpoint_keep": (3, 100),
        "log_every": (20, 1),
    }
    assert old_class_names(text) == ()
    assert from_json(to_json(config)).to_dict() == config.to_dict()


def test_the_configuration_of_an_old_classifier_reads_and_its_class_names_are_kept():
    text = old_file("classifier")
    config = from_json(text)
    expected = default_config("pvt_small", "classifier")
    assert differences(expected, config) == {
        "checkpoint_every": (None, 1000),
        "data.source": ("photos", "folder:train"),
        "grad_accum_steps": (1, 2),
        "model.classes": (1000, 3),
        "model.sr_ratios": ((8, 4, 2, 1), (4, 4, 2, 1)),
        "optimizer.ema_decay": (None, 0.999),
        "validation.fraction": (0.1, 0.0),  # it trained on all images
    }
    assert old_class_names(text) == ("ant", "bee", "cat")


# Checks.


def test_missing_and_foreign_keys_are_named():
    config = default_config().unlock()
    del config.grad_accum_steps
    with pytest.raises(UserError, match="grad_accum_steps"):
        check(config)
    config = default_config()
    config.model.method = "simmim"
    with pytest.raises(UserError, match=r"model\.decoder_depth"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batch_size", 12, "12 .* 8 devices.* such as 16"),
        ("grad_accum_steps", 3, "multiple of 24"),
        ("mesh.fsdp", 3, "3 .* 8 devices"),
        ("dtype", "float16", "float32, bfloat16"),
        ("rematerialize", "all", "none, pairs, blocks, stages"),
        ("fused_attention", None, "True or False"),
        ("image_size", (64,), "height and width"),
        ("image_size", (32.0, 32.0), "integer from 1"),
        ("model.method", "um", "um_mae, mae, simmim, classifier"),
        ("model.encoder", "resnet", "swin, pvt, vit"),
        ("model.channels", 2, "3, or 1"),
        ("model.patch", -4, "from 1"),
        ("model.window", 0, "from 1"),
        ("model.depths", (1.5, 2), "from 1"),
        ("model.widths", (96, 0), "from 1"),
        ("model.mlp_ratios", (4.0, 4.0), "from 1"),
        ("model.secondary_ratio", 1.0, r"\[0, 1\)"),
        ("model.norm_pix_loss", None, "True or False"),
        ("data.source", "", "string"),
        ("data.mean", ("a", "b", "c"), "number"),
        ("data.mean", (0.5,), "1 .* 3"),
        ("data.std", (0.0, 0.1, 0.1), r"\[1e-6, 1000\]"),
        ("data.area", 0.0, r"\(0, 1\]"),
        ("data.threads", 0, "from 1 to 1024, or None"),
        ("log_every", 0, "from 1"),
        ("total_steps", -1, "from 0"),
        ("probe.stage", 4, "0 to 3"),
        ("validation.crop", 0.0, r"\(0, 1\]"),
        ("seed", -1, "from 0 to"),
        ("seed", 2**40, "from 0 to"),
        ("optimizer.clip_norm", 0.0, r"\(0, inf\), or None"),
        ("optimizer.beta1", 2.0, r"\[0, 1\)"),
        ("optimizer.beta1", float("nan"), r"\[0, 1\)"),
        ("optimizer.ema_decay", 1.0, r"\[0, 1\)"),
        ("model.classes", 1, "from 2 to 1048576, or None"),
        ("model.drop_path", 1.0, r"\[0, 1\)"),
        ("augment.erase", 1.5, r"\[0, 1\]"),
        ("augment.magnitude", 11.0, r"\[0, 10\]"),
        ("augment.mixup", -1.0, r"\[0, 1000\]"),
        ("augment.label_smoothing", 1.0, r"\[0, 1\)"),
        ("optimizer.layer_decay", 0.0, r"\(0, 1\]"),
        ("model.sr_ratios", (0, 1), "from 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_accepted_values(key, value, words):
    presets = ("swin_tiny", "um_mae"), ("swin_tiny", "classifier"), ("pvt_small", "simmim")
    config = next(config for config in (default_config(*preset) for preset in presets) if key in flat(config))
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"{re.escape(key)}.*{words}"):
        check(config)


# Files of configurations.


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("config = default_config()", "get_config"),
        ("def get_config(): return 3", "get_config"),
        ("def get_config(): raise OSError('no disk')", "OSError: no disk"),
        ("def get_config():\n  config = default_config()\n  config.accumulate = 2", "accumulate .* grad_accum_steps"),
        ("def get_config():\n  config = default_config()\n  config.optimizer.average", "average .*ema_decay"),
        ("def get_config():\n  config = default_config()\n  config.model.update(reductions=(1,))", "sr_ratios"),
        ("def get_config():\n  config = default_config()\n  config.model.widht = 2", "unknown key widht; .*widths"),
        (
            "def get_config():\n  config = default_config('vit_base')\n  config.model.window = 8",
            r"model\.window .*swin",
        ),
        ("def get_config(): return default_config().sede", "unknown key sede; .*seed"),
        ("import no_such_module", "no_such_module"),
    ],
)
def test_a_faulty_file_is_one_sentence(tmp_path, source, words):
    path = tmp_path / "faulty.py"
    path.write_text(f"from umae_jax.config import default_config\n{source}\n")
    with pytest.raises(UserError, match=rf"faulty\.py.*{words}") as raised:
        load_config(path)
    assert "\n" not in str(raised.value)


def test_a_file_takes_precedence_over_a_bundled_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").image_size == (128, 128)
    (tmp_path / "quickstart").write_text("this is not Python")
    with pytest.raises(UserError, match="quickstart"):
        load_config("quickstart")
    with pytest.raises(UserError, match=r"no file nothing.*quickstart"):
        load_config("nothing")


def test_the_words_behind_a_colon_are_the_argument():
    assert load_config("cifar/pretrain:simmim").model.method == "simmim"


def test_a_removed_key_is_explained():
    assert "class names" in explain_key("data.class_names")


def test_json_is_sorted_and_ends_with_a_newline():
    text = to_json(default_config())
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
