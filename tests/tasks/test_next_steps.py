"""The commands to go on with are right: their flags, configurations and keys exist, and the encoder fits."""

import ast
import shlex
from pathlib import Path

import jax
import pytest
from etils import epath

from tests import small, test_readme, tiny, tiny_classifier
from umae_jax.config import bundled_configs, check, flat, load_config
from umae_jax.tasks import next_steps
from umae_jax.tasks.initialization import adapt_pretrained

PRETRAINING = [name for name in bundled_configs() if not name.startswith(("finetune", "detect"))]
WORKDIR = Path("/runs/my run")


def parse(command):
    """Return the module of a command and its arguments, after a test that its flags exist."""
    python, module_flag, module, *arguments = shlex.split(command)
    assert (python, module_flag) == ("python", "-m")
    file = test_readme.source_of(module)
    direct = test_readme.imported(file)
    known = test_readme.flags_of({file} | direct | set().union(*map(test_readme.imported, direct)))
    assert set(test_readme.FLAG.findall(" ".join(arguments))) - known == set()
    return module, arguments


def finetuning(commands):
    """Return the configuration that the command to fine-tune gives, and its name."""
    (arguments,) = [rest for module, rest in map(parse, commands) if module == "umae_jax.finetune"]
    name = arguments[arguments.index("--config") + 1]
    config = load_config(name)
    for argument in arguments:
        if argument.startswith("--config."):
            key, _, value = argument.removeprefix("--config.").partition("=")
            is_text = isinstance(flat(config)[key], str) or key in ("init", "data.data_dir")
            config.update_from_flattened_dict({key: value if is_text else ast.literal_eval(value)})
    return name, config


@pytest.mark.parametrize("name", [*PRETRAINING, "tiny"])
def test_the_command_to_fine_tune_fits_every_pretraining(name):
    pretrained = tiny.get_config() if name == "tiny" else load_config(name)
    *commands, load = next_steps.after_pretraining(pretrained, WORKDIR).values()
    assert load == 'encoder = umae_jax.load_encoder("/runs/my run/encoder.safetensors")'
    chosen, config = finetuning(commands)
    if f"finetune_{name.removeprefix('pretrain_')}" in bundled_configs():
        assert chosen == f"finetune_{name.removeprefix('pretrain_')}"
    config.model.classes = 3
    assert (config.data.source, config.validation.source) == ("folder:TRAIN", "folder:VALIDATION")
    assert config.init == str(WORKDIR)
    config.batch_size = 8 * jax.device_count()
    check(config)
    if name in ("tiny", "quickstart"):
        encoder = small.random_model(pretrained)[1]["encoder"]
        abstract = jax.eval_shape(lambda: small.random_model(config)[1])["encoder"]
        adapt_pretrained(config, abstract, pretrained, encoder)  # raises unless it fits


def test_labelled_data_of_the_run_are_used_again():
    config = tiny.get_config()
    config.data.source, config.validation.source = "folder:/my train", "folder:/my validation"
    commands = next_steps.after_pretraining(config, WORKDIR).values()
    _, finetune = finetuning([command for command in commands if command.startswith("python")])
    assert (finetune.data.source, finetune.validation.source) == ("folder:/my train", "folder:/my validation")
    assert "python -m umae_jax.evaluate --workdir '/runs/my run' --probe knn" in commands
    assert any("--images '/my train'" in command for command in commands)
    assert not any("TRAIN" in purpose for purpose in next_steps.after_pretraining(config, WORKDIR))


@pytest.mark.parametrize(
    ("validation", "fraction", "measured"),
    [(None, 0.0, False), (None, 0.1, True), ("folder:/validation", 0.0, True)],
)
def test_a_classifier_is_evaluated_and_exported(validation, fraction, measured):
    config = tiny_classifier.get_config()
    config.validation.update(source=validation, fraction=fraction)
    evaluate, classify, convert, _ = next_steps.after_finetuning(config, WORKDIR).values()
    for command in (evaluate, classify, convert):
        assert ("--best" in parse(command)[1]) == measured
    assert ("--validation" in evaluate) != measured


def test_commands_after_a_run_in_a_bucket_write_to_this_machine():
    commands = next_steps.after_pretraining(tiny.get_config(), epath.Path("gs://bucket/run")).values()
    assert any("convert gs://bucket/run --output export/model.safetensors" in command for command in commands)
    assert any("--workdir gs://bucket/run_finetuned" in command for command in commands)
