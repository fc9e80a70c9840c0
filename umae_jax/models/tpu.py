"""What a model does differently where it is compiled for TPUs: the same numbers, laid out otherwise."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128


def for_tpu() -> bool:
    """Whether what is traced will run on TPUs: so the mesh says that is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def last_in_lanes(x: jax.Array) -> jax.Array:
    """The same array, on TPUs laid out row by row: its last axis fills the lanes, whatever the compiler would choose.

    It likes to lay images out batch last, and then turns what becomes of each pixel, in float32, rather than bytes.
    """
    if not for_tpu():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
