"""Platform-specific tracing and compilation, with equal results."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128  # of a TPU's vector registers

# Twice the default limit of VMEM per operation: fusions move larger pieces, and fewer arrays stay in VMEM between
# operations. Only for chips for which steps were compiled with both limits; on v6e it changes nothing. See
# docs/performance.md.
_MORE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": str(32 * 1024)}
_OPTIONS = {"TPU v5 lite": _MORE_VMEM, "TPU v5": _MORE_VMEM}  # by kind of device


def tracing_for(platform: str) -> bool:
    """Return whether the program is being traced for a mesh of `platform` devices, such as "tpu" or "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == platform


def compiler_options(device: jax.Device) -> dict[str, str]:
    """Return the compiler options of a step for this kind of device, for `jax.jit`."""
    return _OPTIONS.get(device.device_kind, {})


def row_major(x: jax.Array) -> jax.Array:
    """Return the same array, on TPUs in row-major layout, so that its last axis fills the lanes.

    By default the compiler puts the batch axis of images last, and transposes pixels as float32, four times the bytes.
    """
    if not tracing_for("tpu"):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
