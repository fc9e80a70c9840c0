"""Timings of steps and of the data loader, as the command `benchmark` prints them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from umae_jax import console
from umae_jax.benchmarking import profile, reading, steps
from umae_jax.config import check, load_config
from umae_jax.errors import UserError
from umae_jax.planning.parts import by_part, time_table
from umae_jax.tasks import make_task

PROFILED_STEPS = 3


def read_other(path: str) -> ConfigDict:
    """Load a configuration of --against; a UserError names the flag."""
    try:
        return load_config(path)
    except UserError as error:
        raise UserError(f"--against: {error}") from None


def _set_batch_size(config: ConfigDict, batch: int | None) -> None:
    """Set the measured batch size, `batch` images per device, without gradient accumulation."""
    config.unlock()
    batch = batch or (8 if jax.default_backend() == "cpu" else 128)
    config.batch_size, config.grad_accum_steps = batch * jax.device_count(), 1


def time_steps(
    configs: Sequence[tuple[str, ConfigDict]], peers: Sequence[str], batch: int | None, rounds: int, *, parts: bool
) -> tuple[dict[str, Any], str]:
    """Time the steps of all contenders in turn.

    Args:
        configs: name or path of each configuration, and the configuration; all run in the dtype of the first.
        peers: names of PyTorch steps.
        batch: images per device and step; None: by the platform.
        rounds: turns of each contender.
        parts: also profile the JAX steps by part of the model.

    Returns:
        The results as JSON, and as text.
    """
    first = configs[0][1]
    contenders = []
    for name, config in configs:
        _set_batch_size(config, batch)
        config.dtype = first.dtype
        check(config)
        shapes = make_task(config).batches()
        largest = f"; it is timed on the largest of {len(shapes)} canvases" if len(shapes) > 1 else ""
        console.say(f"{Path(name).stem}: compiling{largest}")
        contenders.append(steps.jax_step(Path(name).stem, config))
    contenders += [steps.peer_step(name, first) for name in peers]
    steps.time_interleaved(contenders, rounds, console.say)
    results = steps.results(contenders, first.batch_size)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    lines = [f"{device}, {first.batch_size} images per step, {first.dtype}, {rounds} rounds", steps.table(results)]
    for contender, result in zip(contenders, results, strict=True):
        if parts and contender.program:
            scopes = profile.profile_scopes(contender.run_steps, contender.program, PROFILED_STEPS)
            times = result["nanoseconds_by_part"] = by_part(scopes)
            lines.append(f"\n{result['name']}, time by part, summed over threads and devices:")
            lines.append(time_table(times) if times else "the profiler recorded no operations")
    return {"device": device, "dtype": first.dtype, "rounds": rounds, "steps": results}, "\n".join(lines)


def measure_loader(config: ConfigDict, batch: int | None, num_images: int, rounds: int) -> tuple[dict[str, Any], str]:
    """Measure the loader alone and with the training step; return the results as JSON, and as text."""
    result = reading.compare(config, num_images, rounds)
    _set_batch_size(config, batch)
    console.say("compiling the training step")
    result["with_step"] = reading.feed(config, num_images)
    return result, reading.table(result, config)
