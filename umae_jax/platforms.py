"""What is traced otherwise for one platform than for another: the same numbers, laid out or summed otherwise."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128  # of a TPU


def is_for(platform: str) -> bool:
    """Whether what is traced will run on "tpu", "cpu" or whatever: so the mesh says, if one is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == platform


def last_in_lanes(x: jax.Array) -> jax.Array:
    """The same array, on TPUs laid out row by row, so that its last axis fills the lanes.

    Left alone, the compiler puts the batch of images last and transposes their pixels once they are float32, at four
    times the bytes.
    """
    if not is_for("tpu"):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
