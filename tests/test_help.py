"""Help and wrong flags of every command, answered before JAX is imported."""

import re
import subprocess
import sys

import pytest

from tests import commands
from umae_jax.benchmark import PEERS as NAMED_PEERS
from umae_jax.config import bundled_configs, flat, load_config

COMMANDS = ("benchmark", "config", "convert", "data.prepare", "doctor", "evaluate", "finetune", "models", "plan")
COMMANDS += ("inspect_data", "pretrain", "visualize")


def imported(module, *arguments):
    """Run a command; return its status, what it printed, and which slow packages it imported."""
    command = [sys.executable, "-X", "importtime", "-m", f"umae_jax.{module}", *arguments]
    done = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, check=False)
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return done.returncode, done.stdout, names & {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets"}


@pytest.mark.parametrize("module", COMMANDS)
def test_help_says_what_a_command_does_without_importing_jax(module):
    status, output, slow = imported(module, "--help")
    assert (status, slow) == (0, set())
    assert f"python -m umae_jax.{module}" in output
    assert "absl" not in output
    assert "--verbosity" not in output
    assert all(len(line) <= 120 for line in output.splitlines())


def test_help_lists_the_flags_and_the_configurations(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    output, _ = commands.run("pretrain", "--help")
    assert re.findall(r"^  --(\w+)", output, re.MULTILINE) == [
        *("config", "workdir", "step_timeout"),
        *("coordinator_address", "num_processes", "process_id", "initialization_timeout", "heartbeat_timeout"),
    ]
    lines = dict(re.findall(r"^  (\w+) +(\S.*\.)$", output.partition("Configurations:")[2], re.MULTILINE))
    assert lines.keys() == set(bundled_configs())
    assert lines["quickstart"] == "A small Swin on the bundled photographs: minutes on two CPU cores."
    assert "SPEC" not in output


@pytest.mark.parametrize(
    ("module", "lines"),
    [
        ("evaluate", ["--probe knn|linear", "--[no]json", "--batch_size N", "Images per step, .* (default: 256)"]),
        ("plan", ["--topology TEXT", "(may be repeated)", "--[no]largest", "(default: True)", "--config FILE_OR_NAME"]),
    ],
)
def test_flags_are_shown_as_they_are_written(module, lines):
    output, _ = commands.run(module, "--help")
    for line in lines:
        assert re.search(re.escape(line).replace(r"\.\*", ".*"), output), (line, output)


def test_help_with_a_configuration_lists_every_key_with_its_value():
    status, output, slow = imported("finetune", "--config", "finetune_quickstart", "--config.seed=7", "--help")
    assert (status, slow) == (0, set())
    config = load_config("finetune_quickstart")
    rows = dict(re.findall(r"^  ([a-z_0-9.]+)  +(\S.*)$", output, re.MULTILINE))
    assert rows.keys() == flat(config).keys()
    assert rows["seed"].startswith("7 ")
    assert rows["augment.mixup"].startswith(f"{config.augment.mixup} ")
    assert rows["optimizer.beta1"].endswith("AdamW's decay of the first moment")
    assert "\nAugmentation:\n  augment.operations" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workdr=x"], "unknown flag --workdr; did you mean --workdir?"),
        (["--zzz"], "unknown flag --zzz; --help lists the flags"),
        (
            ["--config.optimiser.clip_norm=1"],
            "unknown key --config.optimiser.clip_norm; did you mean --config.optimizer.clip_norm?",
        ),
        (["--config.model.width=(8,8)"], "unknown key --config.model.width; did you mean --config.model.widths?"),
        (["--config.clip_norm", "1"], "unknown key --config.clip_norm; did you mean --config.optimizer.clip_norm?"),
        (["--config.optimiser", "1"], "unknown key --config.optimiser; did you mean --config.optimizer?"),
        (["--config.seed=1", "--config.zzz=1"], "unknown key --config.zzz; `python -m umae_jax.config` lists all keys"),
        (["--config.augment.mixup=1"], "augment.mixup is a key of classifier only"),
        (["--config.accumulate=2"], "accumulate is now called grad_accum_steps"),
    ],
)
def test_a_wrong_flag_is_explained_in_one_sentence(arguments, sentence):
    _, errors = commands.run("pretrain", "--config", "quickstart", *arguments, status=2)
    assert errors == f"error: {sentence}\n"


def test_an_override_without_a_configuration_is_explained():
    sentence = "error: --config.seed changes a configuration; write --config with a file or a name before it\n"
    for arguments in (["--config.seed=1"], ["--config.seed=1", "--config", "quickstart"]):
        assert commands.run("pretrain", *arguments, status=2)[1] == sentence
    status, _, slow = imported("pretrain", "--config.seed=1")
    assert (status, slow) == (2, set())


def test_choices_of_flags_are_those_of_the_modules_that_jax_needs():
    from umae_jax.benchmarking.peers import PEERS
    from umae_jax.pictures import STATISTICS
    from umae_jax.tasks.probing import PROBES
    from umae_jax.weights.exchange import REFERENCE
    from umae_jax.weights.huggingface import LAYOUTS

    choices = {"evaluate": ("probe", PROBES), "convert": ("layout", [REFERENCE, *LAYOUTS])}
    choices["visualize"] = ("statistics", STATISTICS)
    for module, (flag, names) in choices.items():
        assert f"--{flag} {'|'.join(names)}" in commands.run(module, "--help")[0]
    assert list(PEERS) == list(NAMED_PEERS)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("batch_size=abc", "--config.batch_size must be an integer from 1 to 1048576, not 'abc'"),
        ("picture_every=x", "--config.picture_every must be an integer from 0 to 1000000000000, or None, not 'x'"),
        ("batch_size=None", "--config.batch_size must be an integer from 1 to 1048576, not 'None'"),
        ("early_stop=None", "early_stop is a key of classifier only"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_accepted(value, sentence):
    _, errors = commands.run("pretrain", "--config", "quickstart", f"--config.{value}", status=2)
    assert errors == f"error: {sentence}\n"


def test_none_is_a_value_of_optional_keys():
    """Also of tuples, which absl would parse as (None,)."""
    overrides = ("optimizer.decay_at=None", "total_epochs", "None", "seed=1", "init=a", "init=None")
    overrides = [word if word == "None" else f"--config.{word}" for word in overrides]
    later = ["--config.optimizer.clip_norm=None", "--config.optimizer.clip_norm=2.0"]
    status, output, _ = imported("detect", "--config", "detect_tiny", *overrides, *later, "--help")
    assert status == 0
    rows = dict(re.findall(r"^  ([a-z_0-9.]+)  +(\S+)", output, re.MULTILINE))
    values = {
        name: rows[name] for name in ("optimizer.decay_at", "total_epochs", "seed", "init", "optimizer.clip_norm")
    }
    assert list(values.values()) == ["None", "None", "1", "None", "2.0"]
