"""What is traced or compiled otherwise for one kind of device than for another; the numbers are the same."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128  # of a TPU

# How much of a chip's fast memory an operation that XLA:TPU schedules may take at most, twice what it is by default.
# What is fused then goes through it in larger pieces, and less is left to keep arrays there in between. Only for chips
# for which steps have been compiled both ways; on v6e it changes nothing. See benchmarking/SPEED.md.
_MORE_FAST_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": str(32 * 1024)}
_OPTIONS = {"TPU v5 lite": _MORE_FAST_MEMORY, "TPU v5": _MORE_FAST_MEMORY}  # by kind of device


def is_for(platform: str) -> bool:
    """Whether what is traced will run on "tpu", "cpu" or whatever: so the mesh says, if one is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == platform


def compiler_options(device: jax.Device) -> dict[str, str]:
    """What the compiler is told beside the program of a step for devices of this kind, for `jax.jit`."""
    return _OPTIONS.get(device.device_kind, {})


def last_in_lanes(x: jax.Array) -> jax.Array:
    """The same array, on TPUs laid out row by row, so that its last axis fills the lanes.

    Left alone, the compiler puts the batch of images last and transposes their pixels once they are float32, at four
    times the bytes.
    """
    if not is_for("tpu"):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
