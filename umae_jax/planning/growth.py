"""Growth of the cost of a step with image size, depth, batch and number of chips, by compiling variants of a step.

One quantity is varied at a time around a configuration.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.config import check
from umae_jax.errors import UserError, require
from umae_jax.files import write_atomic
from umae_jax.models.build import build_model
from umae_jax.models.kernels import compiler_options
from umae_jax.planning import parts
from umae_jax.planning.flops import count_flops
from umae_jax.planning.targets import OutOfMemory, Target, compile_for, lower_for
from umae_jax.training.metrics import duration

# Variants, as multiples of the configuration's own value.
IMAGE_SIZES = (0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
DEPTHS = (1 / 3, 1.0, 2.0, 3.0)  # blocks of the deepest stage
BATCHES = (0.5, 1.0, 2.0, 4.0)  # images per chip

CACHE_VERSION = 2  # increase when compiled programs are read differently; invalidates the cached costs

SIZE, DEPTH, BATCH, CHIPS = "image size", "depth", "batch", "chips"
AXES = {
    SIZE: "image height in pixels",
    DEPTH: "blocks of the deepest stage",
    BATCH: "images per chip",
    CHIPS: "chips",
}


class Variant(NamedTuple):
    """A step to compile.

    Attributes:
        varied: a key of AXES.
        value: of the varied quantity: pixels of height, blocks, images per chip, or chips.
        config: the whole configuration.
        target: to compile for.
    """

    varied: str
    value: int
    config: ConfigDict
    target: Target

    @property
    def batch_per_chip(self) -> int:
        """Images per chip."""
        return self.config.batch_size // len(self.target.devices)

    def __str__(self) -> str:
        height, width = self.config.image_size
        depths = "-".join(map(str, self.config.model.depths))
        return f"{self.target.name}, {height} x {width}, depths {depths}, {self.batch_per_chip} images per chip"


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a step, per chip; None means unknown.

    Attributes:
        reason: why the step does not fit in memory; "" if it does. If it does not, only `flops` is known.
        flops: counted before compilation.
        cycles: scheduled by XLA:TPU, without collectives.
        bytes_accessed: moved to and from memory.
        temp_bytes: temporary memory.
        collective_bytes: of the arrays exchanged between chips.
        cycles_by_part: `cycles` by part of the model.
        seconds: that compiling took.
    """

    reason: str
    flops: float | None
    cycles: int | None
    bytes_accessed: float | None
    temp_bytes: int | None
    collective_bytes: int | None
    cycles_by_part: dict[str, int]
    seconds: float


class Point(NamedTuple):
    """The cost of a variant.

    Attributes:
        varied, value: of the variant.
        batch_per_chip: images.
        window: `model.window`; None without windows.
        cost: of a step, per chip.
    """

    varied: str
    value: int
    batch_per_chip: int
    window: int | None
    cost: Cost


def make_variants(config: ConfigDict, targets: Sequence[Target], report: Callable[[str], None]) -> list[Variant]:
    """List the steps to compile, the configuration's own first for each quantity.

    Image sizes are the configuration's times a power of two, or times that and 3/4. Windows scale by the factor other
    than the power of two, so that they tile every size; this gives two series, each with its own window. The batch
    shrinks to a quarter with each doubling: each step of a series has the same number of pixels, and costs that do not
    depend on the batch have the same weight.

    Args:
        config: to vary; its batch size is for the first target.
        targets: give the numbers of chips; all other quantities are varied on the first.
        report: receives one line per image size that the model does not support.

    Raises:
        UserError: if the configuration is not valid for the targets.
    """
    base = targets[0]
    check(config, len(base.devices))
    batch = config.batch_size // len(base.devices) // config.grad_accum_steps
    deepest = int(np.argmax(config.model.depths))

    def variant(varied: str, value: int, target: Target = base, batch: int = batch) -> Variant:
        changed = config.copy_and_resolve_references().unlock()
        changed.grad_accum_steps, changed.batch_size = 1, batch * len(target.devices)
        return Variant(varied, value, changed, target)

    variants = [variant(CHIPS, len(target.devices), target) for target in targets]
    for factor in _base_first(BATCHES):
        images = max(1, round(factor * batch))
        variants.append(variant(BATCH, images, batch=images))
    for factor in _base_first(DEPTHS):
        blocks = max(1, round(factor * config.model.depths[deepest]))
        variants.append(variant(DEPTH, blocks))
        depths = list(config.model.depths)
        depths[deepest] = blocks
        variants[-1].config.model.depths = tuple(depths)
    for factor in _base_first(IMAGE_SIZES):
        doublings = round(math.log2(factor))
        height, width = (round(factor * side) for side in config.image_size)
        resized = variant(SIZE, height, batch=max(1, round(batch / 4**doublings)))
        resized.config.image_size = (height, width)
        if "window" in config.model:
            resized.config.model.window = round(config.model.window * factor / 2**doublings)
        try:
            nnx.eval_shape(lambda config=resized.config: build_model(config, nnx.Rngs(0)))
        except UserError as error:
            require(factor != 1, str(error))
            report(f"skipped {height} x {width}: {error}")
            continue
        variants.append(resized)
    unique: dict[tuple[str, int], Variant] = {}
    for one in variants:
        check(one.config, len(one.target.devices))
        unique.setdefault((one.varied, one.value), one)
    return list(unique.values())


def _base_first(factors: Sequence[float]) -> list[float]:
    return sorted(factors, key=lambda factor: (factor != 1, factor))


def measure(variants: Sequence[Variant], folder: Path, report: Callable[[str], None]) -> list[Point]:
    """Compile each variant, unless the cost of the same program is cached.

    Args:
        variants: to compile; the first must fit in memory.
        folder: cache of costs, one file per program.
        report: receives one line per variant.

    Raises:
        UserError: if the first variant does not fit in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    start = time.monotonic()
    for number, variant in enumerate(variants, 1):
        cost = _cost(variant, folder)
        require(
            not cost.reason or bool(points),
            f"batch_size: {variant} {cost.reason}; choose a smaller batch as the base of all variants",
        )
        window = variant.config.model.get("window")
        points.append(Point(variant.varied, variant.value, variant.batch_per_chip, window, cost))
        remaining = (time.monotonic() - start) / number * (len(variants) - number)
        status = cost.reason or "compiled"
        report(f"{number} of {len(variants)}: {variant} {status}; about {duration(remaining)} remaining")
    return points


def _cost(variant: Variant, folder: Path) -> Cost:
    """Return the cost of a variant, from the cache if its program, compilers and options are in it."""
    start = time.monotonic()
    config, target = variant.config, variant.target
    lowered = lower_for(config, target)
    compilers = [f"{name} {metadata.version(name)}" for name in ("jaxlib", *(("libtpu",) if target.topology else ()))]
    options = str(compiler_options(target.devices[0]))
    key = "\n".join([target.name, str(CACHE_VERSION), *compilers, options, lowered.as_text()])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return Cost(**json.loads(path.read_text()))
    stats, reason = None, ""
    try:
        stats = compile_for(lowered, target)
    except OutOfMemory as error:
        reason = str(error)
    flops = count_flops(config)
    by_part = parts.by_part(stats.cycles_by_scope) if stats else {}
    cost = Cost(
        reason=reason,
        flops=flops / len(target.devices) if flops else None,
        cycles=stats.cycles if stats else None,
        bytes_accessed=stats.bytes_accessed if stats else None,
        temp_bytes=stats.temp_bytes if stats else None,
        collective_bytes=sum(collective.bytes for collective in stats.collectives) if stats else None,
        cycles_by_part={name: sum(passes) for name, passes in by_part.items()},
        seconds=time.monotonic() - start,
    )
    write_atomic(path, (json.dumps(dataclasses.asdict(cost), indent=1) + "\n").encode())
    return cost


def to_json(points: Sequence[Point]) -> str:
    """Return the points as a JSON list of objects, with a trailing newline."""
    values = [{**point._asdict(), "cost": dataclasses.asdict(point.cost)} for point in points]
    return json.dumps(values, indent=1) + "\n"
