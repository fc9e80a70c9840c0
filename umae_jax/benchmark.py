"""Compare the speed of training steps, or measure the data loader.

    python -m umae_jax.benchmark --config configs/pretrain_swin_tiny.py [--against FILE ...] [--peer NAME ...]
    python -m umae_jax.benchmark --config configs/pretrain_swin_tiny.py --config.data.source=folder:PATH --loader

Contenders take turns, so other load on the machine affects all alike. Steps are timed on one batch that stays on the
devices. Peers are steps in PyTorch (pip install "umae_jax[peers]").
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from umae_jax import cli, console
from umae_jax.benchmarking import profile, reading, steps
from umae_jax.benchmarking.peers import PEERS
from umae_jax.config import check, load_config
from umae_jax.errors import UserError, require
from umae_jax.planning import parts

PROFILED_STEPS = 3

_CONFIG = cli.define_config()
_AGAINST = flags.DEFINE_multi_string("against", [], "Further configurations, run in the dtype of --config.")
_PEER = flags.DEFINE_multi_string("peer", [], f"PyTorch steps at the sizes of --config: {', '.join(PEERS)}.")
_BATCH = flags.DEFINE_integer("batch", None, "Images per device and step; 8 on CPUs, else 128.", lower_bound=1)
_LOADER = flags.DEFINE_boolean("loader", False, "Measure the data loader instead, alone and with the step.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each contender.", lower_bound=1)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Images per turn of --loader.", lower_bound=1)
_PARTS = flags.DEFINE_boolean("parts", False, "Also profile the JAX steps by part of the model.")
_JSON = flags.DEFINE_boolean("json", False, "Print JSON instead of tables.")


def read_other(path: str) -> ConfigDict:
    """Load a configuration of --against; a UserError names the flag."""
    try:
        return load_config(path)
    except UserError as error:
        raise UserError(f"--against: {error}") from None


def set_batch_size(config: ConfigDict) -> None:
    """Set the measured batch size, without gradient accumulation."""
    config.unlock()
    batch = _BATCH.value or (8 if jax.default_backend() == "cpu" else 128)
    config.batch_size, config.grad_accum_steps = batch * jax.device_count(), 1


def time_steps(config: ConfigDict) -> None:
    """Time the steps of all contenders in turn, and print the results."""
    path = config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])
    contenders = []
    for name, one in [(path, config), *((other, read_other(other)) for other in _AGAINST.value)]:
        set_batch_size(one)
        one.dtype = config.dtype
        check(one)
        console.say(f"{Path(name).stem}: compiling")
        contenders.append(steps.jax_step(Path(name).stem, one))
    contenders += [steps.peer_step(name, config) for name in _PEER.value]
    steps.time_interleaved(contenders, _ROUNDS.value, console.say)
    results = steps.results(contenders, config.batch_size)
    for contender, result in zip(contenders, results, strict=True):
        if _PARTS.value and contender.program:
            scopes = profile.profile_scopes(contender.run_steps, contender.program, PROFILED_STEPS)
            result["nanoseconds_by_part"] = parts.by_part(scopes)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if _JSON.value:
        console.result(json.dumps({"device": device, "dtype": config.dtype, "rounds": _ROUNDS.value, "steps": results}))
        return
    console.result(f"{device}, {config.batch_size} images per step, {config.dtype}, {_ROUNDS.value} rounds")
    console.result(steps.table(results))
    for result in results:
        if (by_part := result.get("nanoseconds_by_part")) is not None:
            console.result(f"\n{result['name']}, time by part, summed over threads and devices:")
            console.result(parts.time_table(by_part) if by_part else "the profiler recorded no operations")


def measure_loader(config: ConfigDict) -> None:
    """Measure the loader alone and with the training step, and print the results."""
    result = reading.compare(config, _NUM_IMAGES.value, _ROUNDS.value)
    set_batch_size(config)
    console.say("compiling the training step")
    result["with_step"] = reading.feed(config, _NUM_IMAGES.value)
    console.result(json.dumps(result) if _JSON.value else reading.table(result, config))


def main() -> None:
    """Measure steps or the loader."""
    config = cli.read_config(_CONFIG)
    if _PARTS.value and importlib.util.find_spec("libtpu") is not None and jax.default_backend() != "tpu":
        platforms = "cpu" if jax.default_backend() == "cpu" else "cuda,cpu"
        require(
            bool(os.environ.get("JAX_PLATFORMS")),
            "--parts: libtpu is installed and its profiler crashes without a TPU; set the environment variable "
            f"JAX_PLATFORMS={platforms}",
        )
    if _LOADER.value:
        measure_loader(config)
    else:
        time_steps(config)


if __name__ == "__main__":
    cli.run(main)
