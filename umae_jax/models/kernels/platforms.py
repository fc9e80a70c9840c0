"""Differences between kinds of devices in tracing and compiling; the numbers are the same."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128  # of a TPU

# The limit of fast memory per operation that XLA:TPU schedules, twice the default: fusions move larger pieces, and less
# memory remains to keep arrays there between operations. Only for chips on which steps have been compiled both ways; on
# v6e it changes nothing. See docs/performance.md.
_MORE_FAST_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": str(32 * 1024)}
_OPTIONS = {"TPU v5 lite": _MORE_FAST_MEMORY, "TPU v5": _MORE_FAST_MEMORY}  # by kind of device


def is_for(platform: str) -> bool:
    """Return whether the mesh in use says that the traced program will run on `platform`, such as "tpu" or "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == platform


def compiler_options(device: jax.Device) -> dict[str, str]:
    """Return the compiler options of a step for this kind of device, for `jax.jit`."""
    return _OPTIONS.get(device.device_kind, {})


def row_major(x: jax.Array) -> jax.Array:
    """Return the same array, on TPUs in row-major layout, so that its last axis fills the lanes.

    By default the compiler puts the batch of images last and transposes their pixels as float32, four times the bytes.
    """
    if not is_for("tpu"):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
