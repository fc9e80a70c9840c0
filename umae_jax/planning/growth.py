"""How the cost of a step grows with the size of images, depth, batch and devices, by what the compiler tells.

One thing is varied at a time, around a configuration on a target.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.config import check
from umae_jax.errors import UserError, require
from umae_jax.files import write_whole
from umae_jax.models.build import build_model
from umae_jax.models.kernels import compiler_options
from umae_jax.planning import parts
from umae_jax.planning.assembly import count_flops
from umae_jax.planning.hardware import GIB
from umae_jax.planning.targets import DoesNotFit, Target, compile_for, lower_for
from umae_jax.training.metrics import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Times the configuration's own.
SIDES = (0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of an image
DEPTHS = (1 / 3, 1.0, 2.0, 3.0)  # blocks of the deepest stage
BATCHES = (0.5, 1.0, 2.0, 4.0)  # images a chip

CACHE_VERSION = 1  # goes up when programs are read otherwise, so that no cost is kept of a reading before

SIZE, DEPTH, BATCH, DEVICES = "image size", "depth", "batch", "devices"
AXES = {
    SIZE: "height of an image in pixels",
    DEPTH: "blocks of the deepest stage",
    BATCH: "images a chip",
    DEVICES: "chips",
}

NOTES = {True: "grows with pixels to the power", False: "off a straight line by at most"}  # whether of images' size


class Setting(NamedTuple):
    """One step to be compiled.

    Attributes:
        varied: a key of AXES.
        value: of what is varied: height in pixels, blocks, images a chip, or chips.
        config: the whole of it.
        target: what it is for.
    """

    varied: str
    value: int
    config: ConfigDict
    target: Target

    @property
    def images(self) -> int:
        """A chip."""
        return self.config.batch_size // len(self.target.devices)

    def __str__(self) -> str:
        height, width = self.config.image_size
        depths = "-".join(map(str, self.config.model.depths))
        return f"{self.target.name}, {height} x {width}, blocks {depths}, {self.images} images a chip"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step costs a chip; None is not known.

    Attributes:
        needs: empty if it fits in memory, else the compiler's words; then nothing below is known but flops.
        flops: operations, by the program before it is compiled.
        cycles: scheduled, without collectives.
        bytes: moved between memory and chip.
        temp_bytes: bytes of memory.
        collectives: bytes of the arrays that are passed between chips.
        parts: cycles by part of the model.
        seconds: that finding out took.
    """

    needs: str
    flops: float | None
    cycles: int | None
    bytes: float | None
    temp_bytes: int | None
    collectives: int | None
    parts: dict[str, int]
    seconds: float


class Point(NamedTuple):
    """What a setting costs.

    Attributes:
        varied, value: of the setting.
        images: a chip.
        window: `model.window`; None without windows.
        cost: a chip and a step.
    """

    varied: str
    value: int
    images: int
    window: int | None
    cost: Cost


# What is drawn of a whole step, and as what its cycles are drawn.
QUANTITIES: dict[str, Callable[[Cost], float | None]] = {
    "scheduled cycles": lambda cost: cost.cycles,
    "operations": lambda cost: cost.flops,
    "bytes moved": lambda cost: cost.bytes,
    "temp_bytes": lambda cost: cost.temp_bytes,
    "bytes of collectives": lambda cost: cost.collectives or None,
}
GROUPS = ("encoder attention", "encoder MLPs", "decoder attention", "decoder, rest", "optimizer", "rest")
WHATEVER_ITS_BATCH = ("bytes of collectives", "optimizer")  # cost a step the same, and say nothing of an image


def settings(config: ConfigDict, targets: Sequence[Target], say: Callable[[str], None]) -> list[Setting]:
    """The steps to be compiled, the configuration's own first in each thing that is varied.

    The side of an image is the configuration's times a power of two, or times that and 3/4. Windows grow by the latter,
    so that they tile all sizes, and there are two series with a window each. A batch has a quarter of the images for
    each doubling: along a series it has as many pixels, and what a step costs whatever its batch weighs the same.

    Args:
        config: what is varied; its batch is that of the first target.
        targets: the devices to vary; all else is varied on the first.
        say: takes a line to the user on each size that the model does not take.

    Raises:
        UserError: if the configuration does not suit the targets.
    """
    base = targets[0]
    check(config, len(base.devices))
    images = config.batch_size // len(base.devices) // config.grad_accum_steps
    stage = int(np.argmax(config.model.depths))
    depth, height = config.model.depths[stage], config.image_size[0]

    def setting(varied: str, value: int, target: Target = base, images: int = images) -> Setting:
        changed = config.copy_and_resolve_references().unlock()
        changed.grad_accum_steps, changed.batch_size = 1, images * len(target.devices)
        return Setting(varied, value, changed, target)

    found: dict[tuple[str, int], Setting] = {}

    def add(one: Setting) -> None:
        found.setdefault((one.varied, one.value), one)

    for target in targets:
        add(setting(DEVICES, len(target.devices), target))
    for times in _own_first(BATCHES):
        count = max(1, round(times * images))
        add(setting(BATCH, count, images=count))
    for times in _own_first(DEPTHS):
        blocks = max(1, round(times * depth))
        one = setting(DEPTH, blocks)
        one.config.model.depths = (*config.model.depths[:stage], blocks, *config.model.depths[stage + 1 :])
        add(one)
    for times in _own_first(SIDES):
        doublings = round(math.log2(times))
        one = setting(SIZE, round(times * height), images=max(1, round(images / 4**doublings)))
        one.config.image_size = tuple(round(times * side) for side in config.image_size)
        one.config.model.window = round(config.model.window * times / 2**doublings)
        try:
            nnx.eval_shape(lambda one=one: build_model(one.config, nnx.Rngs(0)))
        except UserError as error:
            require(times != 1, str(error))
            say(f"left out {one.config.image_size[0]} x {one.config.image_size[1]}: {error}")
            continue
        add(one)
    for one in found.values():
        check(one.config, len(one.target.devices))
    return list(found.values())


def _own_first(times: Sequence[float]) -> list[float]:
    return sorted(times, key=lambda time: (time != 1, time))


def measure(settings: Sequence[Setting], folder: Path, say: Callable[[str], None]) -> list[Point]:
    """Compile each, unless a program that is the same has been compiled already.

    Args:
        settings: what to compile; the first one must fit.
        folder: keeps what each program costs, for this run and others.
        say: takes lines of progress.

    Raises:
        UserError: if the first one does not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    start = time.monotonic()
    for number, setting in enumerate(settings, 1):
        cost = _cost(setting, folder)
        require(
            not cost.needs or bool(points),
            f"batch_size: {setting} {cost.needs}; choose a smaller one, around which others are varied",
        )
        window = setting.config.model.window if setting.config.model.encoder == "swin" else None
        points.append(Point(setting.varied, setting.value, setting.images, window, cost))
        left = (time.monotonic() - start) / number * (len(settings) - number)
        say(f"{number} of {len(settings)}: {setting} {cost.needs or 'compiled'}; about {duration(left)} left")
    return points


def _cost(setting: Setting, folder: Path) -> Cost:
    start = time.monotonic()
    config, target = setting.config, setting.target
    lowered = lower_for(config, target)
    compilers = [f"{name} {metadata.version(name)}" for name in ("jaxlib", *(("libtpu",) if target.slice else ()))]
    told_of = f"{CACHE_VERSION} {[field.name for field in dataclasses.fields(Cost)]}"
    options = str(compiler_options(target.devices[0]))
    program = "\n".join([target.name, told_of, *compilers, options, lowered.as_text()])
    path = folder / f"{hashlib.sha256(program.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return Cost(**json.loads(path.read_text()))
    told, needs = None, ""
    try:
        told = compile_for(lowered, target)
    except DoesNotFit as answer:
        needs = str(answer)
    flops = count_flops(config)
    cost = Cost(
        needs=needs,
        flops=flops / len(target.devices) if flops else None,
        cycles=told.cycles if told else None,
        bytes=told.bytes if told else None,
        temp_bytes=told.temp_bytes if told else None,
        collectives=sum(one.bytes for one in told.collectives) if told else None,
        parts={name: sum(both) for name, both in parts.by_part(told.cycles_by_scope).items()} if told else {},
        seconds=time.monotonic() - start,
    )
    write_whole(path, (json.dumps(dataclasses.asdict(cost), indent=1) + "\n").encode())
    return cost


def to_json(points: Sequence[Point]) -> str:
    """The points, each with what a chip and a step of it costs."""
    return (
        json.dumps([{**point._asdict(), "cost": dataclasses.asdict(point.cost)} for point in points], indent=1) + "\n"
    )


def group_of(part: str) -> str:
    """Which of GROUPS a part of a model, as `parts.part_of` names it, belongs to."""
    place, _, layer = part.partition(", ")
    if place == "decoder":
        return "decoder attention" if layer == "attention" else "decoder, rest"
    groups = {"attention": "encoder attention", "mlp": "encoder MLPs"}
    return groups.get(layer, "optimizer" if place == "optimizer" else "rest")


class Line(NamedTuple):
    """What one thing costs as another is varied.

    Attributes:
        name: a key of QUANTITIES, or of a group of parts.
        x: what is varied, in ascending order; pixels for the size of images.
        y: a chip and a step; for the size of images, an image.
    """

    name: str
    x: np.ndarray
    y: np.ndarray

    @property
    def exponent(self) -> float:
        """That of the power of x that lies closest to y."""
        return float(np.polyfit(np.log(self.x), np.log(self.y), 1)[0])

    @property
    def bend(self) -> float:
        """The largest distance from the closest straight line, as a share of the largest y."""
        return float(np.max(np.abs(np.polyval(np.polyfit(self.x, self.y, 1), self.x) - self.y)) / np.max(self.y))


def lines(points: Sequence[Point], *, by_group: bool) -> list[Line]:
    """The lines of points that all vary the same thing with the same windows; those with no cost are left out.

    Args:
        points: fewer than two that fit give no lines.
        by_group: cycles of GROUPS rather than QUANTITIES.
    """
    fitting = sorted((point for point in points if not point.cost.needs), key=lambda point: point.value)
    if len(fitting) < 2:
        return []
    size = fitting[0].varied == SIZE
    x = np.array([_place(point) for point in fitting])
    images = np.array([point.images if size else 1 for point in fitting])
    columns: dict[str, list[float | None]]
    if by_group:
        columns = {name: [_cycles(point.cost, name) for point in fitting] for name in GROUPS}
    else:
        columns = {name: [of(point.cost) for point in fitting] for name, of in QUANTITIES.items()}
    return [
        Line(name, x, np.array(column, np.float64) / images)
        for name, column in columns.items()
        if all(column) and not (size and name in WHATEVER_ITS_BATCH)
    ]


def _place(point: Point) -> float:
    """Where a point lies on the axis of what is varied."""
    return float(point.value**2 if point.varied == SIZE else point.value)


def _cycles(cost: Cost, group: str) -> int:
    return sum(cycles for part, cycles in cost.parts.items() if group_of(part) == group)


def series(points: Sequence[Point], varied: str) -> list[list[Point]]:
    """The points that vary a thing, one list for each size of windows, the configuration's own first."""
    chosen = [point for point in points if point.varied == varied]
    return [[point for point in chosen if point.window == window] for window in dict.fromkeys(p.window for p in chosen)]


def table(points: Sequence[Point]) -> str:
    """What was found, and how each thing grows."""
    text = []
    for varied, axis in AXES.items():
        each = "an image" if varied == SIZE else "a chip and step"
        for one in series(points, varied):
            window = f", model.window {one[0].window}" if varied == SIZE and one[0].window else ""
            text.append(f"\n{varied}{window}, {each}:")
            text.append(
                f"{axis:>28}{'images':>8}{'M cycles':>10}{'TFLOP':>8}{'GB moved':>10}{'GiB':>8}{'MB passed':>11}"
            )
            for point in sorted(one, key=lambda point: point.value):
                cost, share = point.cost, point.images if varied == SIZE else 1
                numbers = [
                    _number(cost.cycles, 1e6 * share, 10, 2),
                    _number(cost.flops, 1e12 * share, 8, 3),
                    _number(cost.bytes, 1e9 * share, 10, 2),
                    _number(cost.temp_bytes, GIB * share, 8, 3),
                    _number(None if varied == SIZE else cost.collectives, 1e6, 11, 1),
                ]
                text.append(f"{point.value:28,}{point.images:8}" + "".join(numbers) + (f"  {cost.needs}"))
            text.append(f"{NOTES[varied == SIZE]:>28}")
            for by_group in (False, True):
                text += [f"{_label(line, varied):>28}" for line in lines(one, by_group=by_group)]
    return "\n".join(line.rstrip() for line in text).strip()


def _number(value: float | None, scale: float, width: int, digits: int) -> str:
    return f"{'-' if value is None else f'{value / scale:,.{digits}f}':>{width}}"


def _label(line: Line, varied: str) -> str:
    return f"{line.name}: " + (f"{line.exponent:.2f}" if varied == SIZE else f"{line.bend:.1%}")


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw a row for each thing that is varied: the whole step, and where the compiler tells, its parts.

    Both axes are logarithmic for the size of images, beside a dotted line of slope 1; else neither, beside the closest
    straight lines.

    Raises:
        UserError: if too few points fit in memory to draw anything.
    """
    import matplotlib.figure

    shown = [varied for varied in AXES if any(lines(one, by_group=False) for one in series(points, varied))]
    require(bool(shown), "--growth: of each thing that is varied only one value fits in memory; choose a smaller batch")
    columns = 2 if any(point.cost.parts for point in points) else 1
    figure = matplotlib.figure.Figure(figsize=(5.4 * columns, 3.7 * len(shown) + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, varied in enumerate(shown):
        for column in range(columns):
            _panel(axes[row][column], points, varied, by_group=column == 1)
    figure.savefig(path, dpi=90)


def _panel(axes: "Axes", points: Sequence[Point], varied: str, *, by_group: bool) -> None:
    size = varied == SIZE
    each = "an image" if size else "a chip and step"
    first, *others = series(points, varied)
    origin, guide = _place(first[0]), 0.0
    scales: dict[str, float] = {}
    for number, one in enumerate((first, *others)):
        for line in lines(one, by_group=by_group):
            if number == 0:
                at_origin = float(line.y[list(line.x).index(origin)])
                scales[line.name] = 1e6 if by_group else at_origin
                guide = max(guide, at_origin / scales[line.name])
            if line.name not in scales:
                continue
            y = line.y / scales[line.name]
            color = f"C{(GROUPS if by_group else tuple(QUANTITIES)).index(line.name)}"
            label = _label(line, varied) if number == 0 else None
            face = color if number == 0 else "white"
            axes.plot(line.x, y, "o", color=color, markerfacecolor=face, label=label)
            straight = y if size else np.polyval(np.polyfit(line.x, y, 1), line.x)
            axes.plot(line.x, straight, "-" if number == 0 else "--", color=color, linewidth=1)
    ticks = {_place(point): f"{point.value}" for point in points if point.varied == varied}
    top = axes.get_ylim()[1]
    if size:
        axes.set_xscale("log")
        axes.set_yscale("log")
        x = np.array(sorted(ticks))
        axes.plot(x, guide * x / origin, ":", color="black", label="in proportion: 1")
        axes.set_ylim(top=10 * top)  # room for the legend
    else:
        axes.set_ylim(0, 1.5 * top)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)
    windows = f" (model.window {first[0].window}; hollow: {others[0][0].window})" if size and others else ""
    axes.set_xlabel(AXES[varied] + windows)
    axes.set_ylabel(f"M cycles {each}" if by_group else f"{each}, times that at {first[0].value}")
    axes.grid(alpha=0.3)
    axes.legend(title=NOTES[size], fontsize="x-small", title_fontsize="x-small", ncols=2, loc="upper left")
