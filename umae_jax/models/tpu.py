"""What a model does differently where it is compiled for TPUs: the same numbers, laid out otherwise."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128


def for_tpu() -> bool:
    """Whether what is traced will run on TPUs: so the mesh says that is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def last_in_lanes(x: jax.Array) -> jax.Array:
    """The same array, on TPUs laid out row by row, so that its last axis fills the lanes.

    Left alone, the compiler puts the batch of images last and transposes their pixels once they are float32, at four
    times the bytes.
    """
    if not for_tpu():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
