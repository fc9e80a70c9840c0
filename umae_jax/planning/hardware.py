"""What chips can do, as their makers publish it."""

import math
from typing import NamedTuple

from umae_jax.errors import UserError, listing, require

GIB = 2**30


class Chip(NamedTuple):
    """An accelerator, as JAX counts devices.

    Attributes:
        flops: bfloat16 operations a second, at best.
        memory: bytes that a program may have.
        bandwidth: bytes a second between memory and chip.
        link: bytes a second over one link of the interconnect, one way; 0 where it is not known.
        clock: cycles a second.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    clock: float = 0.0


# Flops, bandwidth and links: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation (a link is the
# bidirectional bandwidth of a chip over its ports, halved). Memory: what XLA:TPU names as available when a program does
# not fit. Clock: the rate at which the operations of a cycle in XLA:TPU's own estimates of large matrix products
# (131,072, 262,144 and 524,288) make up these flops.
TPUS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 1.503e9),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 100e9, 1.751e9),
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 100e9, 1.751e9),
}
# By the kind that JAX gives a device. NVIDIA's data sheets, without sparsity.
KINDS = {
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9),
}

GPUS = ("a100", "h100", "h200")  # may be named for those that are there; there is no compiler for others

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_MAX_CUBE = (16, 16, 24)


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
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip:
        """What each can do."""
        return TPUS[self.generation]

    def links(self, kind: str, devices: int) -> int:
        """Links that a chip sends over at once in a collective of a kind among so many.

        All chips together use every axis, two links where it closes to a ring, else one. A part of them is held to lie
        on a line, as which axes it lies on depends on the mesh, but for one that is a whole ring.
        """
        closed = 16 if self.generation in ("v5e", "v6e") else 4
        if kind == "collective-permute":
            return 1
        if devices == self.chips:
            return max(1, sum(2 if size % closed == 0 else 1 for size in self.shape if size > 1))
        return 2 if devices in self.shape and devices % closed == 0 else 1


def topology(name: str) -> Topology:
    """The slice of a name such as "v5e:4x4".

    Raises:
        UserError: if there is none.
    """
    generation, _, shape = name.partition(":")
    require(
        generation in TPUS,
        f"--topology: {name!r} begins with none of {', '.join(TPUS)} and is none of {', '.join(GPUS)}; "
        "write v5e:4x4, say",
    )
    sides = tuple(int(side) for side in shape.split("x") if side.isdecimal())
    if generation in ("v5e", "v6e"):
        exists = sides in _FLAT
        known = [f"{generation}:{rows}x{columns}" for rows, columns in _FLAT]
    else:
        cube = len(sides) == 3 and all(
            side % 4 == 0 and 0 < side <= most for side, most in zip(sides, _MAX_CUBE, strict=True)
        )
        exists = sides in _SMALL_CUBES or (cube and list(sides) == sorted(sides))
        examples = (*_SMALL_CUBES, (4, 4, 4), (4, 4, 8), (4, 8, 8))
        known = [f"{generation}:{'x'.join(map(str, example))}" for example in examples] + ["and so on in steps of 4"]
    if not exists or shape != "x".join(map(str, sides)):
        raise UserError(f"--topology: there is no {name}; choose one of {listing(known, len(known))}")
    return Topology(name, generation, sides)
