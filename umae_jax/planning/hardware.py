"""Published specifications of accelerators, and the TPU slices that exist."""

import math
from typing import NamedTuple

from umae_jax.console import GIB
from umae_jax.errors import UserError, listing, require


class Chip(NamedTuple):
    """One accelerator, counted as JAX counts devices.

    Attributes:
        peak_flops: bfloat16 FLOP/s.
        memory: bytes that a program may use.
        bandwidth: of the memory, bytes/s.
        link_bandwidth: of one interconnect link in one direction, bytes/s; 0 if unknown.
        clock: cycles/s; 0 if unknown.
    """

    peak_flops: float
    memory: float
    bandwidth: float
    link_bandwidth: float = 0.0
    clock: float = 0.0


# FLOP/s, bandwidth and links: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation. Links: half
# of a chip's bidirectional bandwidth divided by its number of ports. Memory: the amount that XLA:TPU reports as
# available when a program does not fit. Clock: peak_flops divided by the FLOPs per cycle in XLA:TPU's own estimates
# for large matrix products (131,072, 262,144 and 524,288).
TPUS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 1.503e9),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 100e9, 1.751e9),
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 100e9, 1.751e9),
}
# By JAX's `device_kind`. GPUs: NVIDIA's data sheets, without sparsity.
CHIPS = {
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9),
}

GPUS = ("a100", "h100", "h200")  # valid only on a machine that has one: XLA:GPU compiles for local devices

_PLANAR_SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBOIDS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_MAX_CUBOID = (16, 16, 24)


class Topology(NamedTuple):
    """A slice of a TPU pod.

    Attributes:
        name: such as "v5e:4x4".
        generation: a key of TPUS.
        shape: chips along each axis.
    """

    name: str
    generation: str
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Number of chips in the slice."""
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip:
        """Specification of each chip."""
        return TPUS[self.generation]

    def links(self, kind: str, group_size: int) -> int:
        """Return how many links a chip sends over at once during a collective.

        A collective over all chips uses every axis: two links where the axis closes to a ring, one otherwise. A
        collective over fewer chips is assumed to run along one axis, as a line unless it spans a whole ring.

        Args:
            kind: of the collective, such as "all-reduce".
            group_size: chips that take part in it.
        """
        ring = 16 if self.generation in ("v5e", "v6e") else 4  # an axis closes to a ring at multiples of this length
        if kind == "collective-permute":
            return 1
        if group_size == self.num_chips:
            return max(1, sum(2 if size % ring == 0 else 1 for size in self.shape if size > 1))
        return 2 if group_size in self.shape and group_size % ring == 0 else 1


def parse_topology(name: str) -> Topology:
    """Parse the name of a TPU slice, such as "v5e:4x4".

    Raises:
        UserError: if no such slice exists.
    """
    generation, _, shape = name.partition(":")
    require(
        generation in TPUS,
        f"--topology: {name!r} starts with none of {', '.join(TPUS)} and is none of {', '.join(GPUS)}; "
        "write for example v5e:4x4",
    )
    sizes = tuple(int(size) for size in shape.split("x") if size.isdecimal())
    if generation in ("v5e", "v6e"):
        exists = sizes in _PLANAR_SLICES
        choices = [f"{generation}:{rows}x{columns}" for rows, columns in _PLANAR_SLICES]
    else:
        is_cuboid = len(sizes) == 3 and all(
            size % 4 == 0 and 0 < size <= largest for size, largest in zip(sizes, _MAX_CUBOID, strict=True)
        )
        exists = sizes in _SMALL_CUBOIDS or (is_cuboid and list(sizes) == sorted(sizes))
        examples = (*_SMALL_CUBOIDS, (4, 4, 4), (4, 4, 8), (4, 8, 8))
        choices = [f"{generation}:{'x'.join(map(str, example))}" for example in examples] + ["and so on in steps of 4"]
    if not exists or shape != "x".join(map(str, sizes)):
        raise UserError(f"--topology: there is no {name}; choose one of {listing(choices, len(choices))}")
    return Topology(name, generation, sizes)
