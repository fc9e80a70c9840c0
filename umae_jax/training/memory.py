"""Device memory of a training step: what the compiler expects, and what to write if it is too much."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from umae_jax.console import say
from umae_jax.errors import UserError

Compile = Callable[[ConfigDict], jax.stages.Compiled]  # of the training step of a configuration


def step_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the memory per device that a compiled step needs; donated arguments count once."""
    memory: Any = compiled.memory_analysis()
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments + results + memory.temp_size_in_bytes


def tree_bytes(arrays: Any) -> int:  # noqa: ANN401 - a pytree
    """Return the bytes of all arrays or shapes of a tree."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))


def device_bytes(device: Any) -> int | None:  # noqa: ANN401
    """Return the memory that programs may use on a device, None if it is unknown; CPU devices share their host's."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is only compiled for
        return None


def is_exhausted(error: BaseException) -> bool:
    """Return whether the compiler or a device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def explain_exhaustion(
    config: ConfigDict, compile_step: Compile, limit: int | None, *, fixed_batch: bool = False
) -> Iterator[None]:
    """Turn an error for lack of device memory into one that names settings that fit.

    Args:
        config: of the run.
        compile_step: compiles the step of a changed configuration; raises UserError for one that is not valid.
        limit: bytes that programs may use per device; None: only the compiler knows it.
        fixed_batch: suggest no smaller batch, as for a run that continues.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        say("the training step does not fit into device memory; compiling other settings to find some that do ...")
        choices = find_fitting(config, compile_step, limit, fixed_batch=fixed_batch)
        found = (
            f"by the compiler's count these fit: {', or '.join(choices)}"
            if choices
            else (
                "nor does it with any larger grad_accum_steps; choose a smaller model or image_size, more devices, or "
                "mesh.fsdp to share the parameters among them"
            )
        )
        message = f"batch_size: a step of {config.batch_size} images does not fit into device memory; {found}"
        raise UserError(message) from error


def find_fitting(
    config: ConfigDict, compile_step: Compile, limit: int | None, *, fixed_batch: bool = False
) -> list[str]:
    """Return overrides of the configuration with which its step fits into `limit` bytes per device.

    Compiles the step for ever more `grad_accum_steps`, with and without rematerialisation, until one fits.

    Args:
        config, compile_step, limit, fixed_batch: see `explain_exhaustion`.
    """
    choices: list[str] = []
    for rematerialize in dict.fromkeys((config.rematerialize, "blocks")):
        other = copy.deepcopy(config)
        other.rematerialize = rematerialize
        if rematerialize == config.rematerialize:
            other.grad_accum_steps *= 2
        if _split_until_it_fits(other, compile_step, limit):
            extra = "" if rematerialize == config.rematerialize else f" --config.rematerialize={rematerialize}"
            choices.append(f"--config.grad_accum_steps={other.grad_accum_steps}{extra}")
            smaller = config.batch_size * config.grad_accum_steps // other.grad_accum_steps
            if smaller < config.batch_size and not fixed_batch:
                choices.append(f"--config.batch_size={smaller}{extra}")
    return choices


def _split_until_it_fits(config: ConfigDict, compile_step: Compile, limit: int | None) -> bool:
    """Double `grad_accum_steps` until the step fits; return False if the batch cannot be divided so often."""
    while True:
        try:
            needed = step_bytes(compile_step(config))
        except UserError:
            return False
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
        else:
            if limit is None or needed <= limit:
                return True
        config.grad_accum_steps *= 2
