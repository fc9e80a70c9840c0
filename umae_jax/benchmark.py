"""Measure how fast training steps are, side by side, or how fast images are read.

    python -m umae_jax.benchmark --config configs/pretrain_swin_tiny.py [--against FILE ...] [--peer NAME ...]
    python -m umae_jax.benchmark --config configs/pretrain_swin_tiny.py --config.data.source=folder:PATH --loader

All take turns in one run, so that what else the machine does falls on each alike. Steps are timed on one batch that
lies on the device; peers are steps in PyTorch, which pip install "umae_jax[peers]" brings.
"""

import importlib.util
import json
import os
import runpy
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from umae_jax import cli
from umae_jax.benchmarking import profile, reading, steps
from umae_jax.benchmarking.peers import PEERS
from umae_jax.config import check
from umae_jax.errors import UserError, require
from umae_jax.planning import parts

PROFILED = 3  # steps

_CONFIG = cli.define_config()
_AGAINST = flags.DEFINE_multi_string("against", [], "Files of further configurations; take the first one's dtype.")
_PEER = flags.DEFINE_multi_string("peer", [], f"Steps in PyTorch of the configuration's sizes: {', '.join(PEERS)}.")
_BATCH = flags.DEFINE_integer("batch", None, "Images a device and step; 8 on CPUs, else 128.", lower_bound=1)
_LOADER = flags.DEFINE_boolean("loader", False, "Measure the reading of images instead, alone and for the step.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each takes its turn.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 512, "Images a turn that are read.", lower_bound=1)
_PARTS = flags.DEFINE_boolean("parts", False, "Also tell by JAX's profiler where the time of our steps goes.")
_JSON = flags.DEFINE_boolean("json", False, "Print JSON instead of a table.")


def read_other(path: str) -> ConfigDict:
    """The configuration of a file.

    Raises:
        UserError: if it gives none.
    """
    require(Path(path).is_file(), f"--against: there is no file {path}; write one such as configs/quickstart.py")
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # the file is a program of the user's and may raise anything
        raise UserError(f"--against: {path}: {type(error).__name__}: {error}") from None
    require(isinstance(config, ConfigDict), f"--against: get_config() of {path} must return a changed default_config()")
    return config


def set_batch(config: ConfigDict) -> None:
    """Give a configuration the batch that is measured."""
    config.unlock()
    batch = _BATCH.value or (8 if jax.default_backend() == "cpu" else 128)
    config.batch_size, config.grad_accum_steps = batch * jax.device_count(), 1


def time_steps(config: ConfigDict) -> None:
    """Time steps in turn, and print what was found."""
    contenders = []
    own = config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])
    for name, one in [(own, config), *((path, read_other(path)) for path in _AGAINST.value)]:
        set_batch(one)
        one.dtype = config.dtype
        check(one)
        cli.say(f"{Path(name).stem}: compiling")
        contenders.append(steps.our_step(Path(name).stem, one))
    contenders += [steps.peer_step(name, config) for name in _PEER.value]
    steps.time_in_turn(contenders, _ROUNDS.value, cli.say)
    told = steps.results(contenders, config.batch_size)
    for contender, result in zip(contenders, told, strict=True):
        if _PARTS.value and contender.program:
            result["parts"] = parts.by_part(profile.measure(contender.take, contender.program, PROFILED))
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if _JSON.value:
        cli.result(json.dumps({"device": device, "dtype": config.dtype, "rounds": _ROUNDS.value, "steps": told}))
    else:
        cli.result(f"{device}, {config.batch_size} images a step, {config.dtype}, {_ROUNDS.value} rounds")
        cli.result(steps.table(told))
        for result in told:
            if "parts" in result and not result["parts"]:
                cli.result(f"\n{result['name']}: JAX's profiler tells of no operation here")
            elif "parts" in result:
                cli.result(f"\n{result['name']}, the time of operations, threads and devices added up:")
                cli.result(parts.table_of_times(result["parts"]))


def main() -> None:
    """Measure and print."""
    config = cli.read_config(_CONFIG)
    if _PARTS.value and importlib.util.find_spec("libtpu") is not None and jax.default_backend() != "tpu":
        require(
            bool(os.environ.get("JAX_PLATFORMS")),
            "--parts: libtpu is installed, whose profiler ends the program where there is no TPU; set the environment "
            f"variable JAX_PLATFORMS={'cpu' if jax.default_backend() == 'cpu' else 'cuda,cpu'}",
        )
    if _LOADER.value:
        result = reading.compare(config, _IMAGES.value, _ROUNDS.value)
        set_batch(config)
        cli.say("compiling the step that images are read for")
        result["with the step"] = reading.feed(config, _IMAGES.value)
        cli.result(json.dumps(result) if _JSON.value else reading.table(result, config))
    else:
        time_steps(config)


if __name__ == "__main__":
    cli.run(main)
