"""A table and a figure of how the cost of a step grows, with fitted exponents and deviations from a line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from umae_jax.console import GIB
from umae_jax.errors import require
from umae_jax.planning.growth import AXES, SIZE, Cost, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTITIES: dict[str, Callable[[Cost], float | None]] = {
    "scheduled cycles": lambda cost: cost.cycles,
    "model FLOPs": lambda cost: cost.flops,
    "bytes accessed": lambda cost: cost.bytes_accessed,
    "temporary memory": lambda cost: cost.temp_bytes,
    "bytes of collectives": lambda cost: cost.collective_bytes or None,
}
GROUPS = ("encoder attention", "encoder MLPs", "decoder attention", "decoder, rest", "optimizer", "rest")
BATCH_INDEPENDENT = ("bytes of collectives", "optimizer")  # meaningless per image

FIT_TITLES = {True: "grows with pixels to the power", False: "max deviation from a line"}  # True: image size


def group_of(part: str) -> str:
    """Return the member of GROUPS that a part of the model belongs to; for parts see `parts.part_of`."""
    place, _, layer = part.partition(", ")
    if place == "decoder":
        return "decoder attention" if layer == "attention" else "decoder, rest"
    groups = {"attention": "encoder attention", "mlp": "encoder MLPs"}
    return groups.get(layer, "optimizer" if place == "optimizer" else "rest")


class Line(NamedTuple):
    """One cost as a function of the varied quantity.

    Attributes:
        name: a key of QUANTITIES or a member of GROUPS.
        x: the varied quantity in ascending order [N]; pixels for the image size.
        y: per chip and step [N]; per image for the image size.
    """

    name: str
    x: np.ndarray
    y: np.ndarray

    @property
    def exponent(self) -> float:
        """Exponent of the power law fitted to y."""
        return float(np.polyfit(np.log(self.x), np.log(self.y), 1)[0])

    @property
    def deviation(self) -> float:
        """Max distance from the fitted straight line, as a fraction of the max y."""
        fitted = np.polyval(np.polyfit(self.x, self.y, 1), self.x)
        return float(np.max(np.abs(fitted - self.y)) / np.max(self.y))


def fit_lines(points: Sequence[Point], *, by_group: bool) -> list[Line]:
    """Return the lines of points that vary the same quantity with the same window; without zero or unknown costs.

    Args:
        points: those that do not fit in memory are ignored; fewer than two give no lines.
        by_group: cycles of GROUPS rather than QUANTITIES.
    """
    fitting = sorted((point for point in points if not point.cost.reason), key=lambda point: point.value)
    if len(fitting) < 2:
        return []
    per_image = fitting[0].varied == SIZE
    x = np.array([_x(point) for point in fitting])
    divisor = np.array([point.batch_per_chip if per_image else 1 for point in fitting])
    columns: dict[str, list[float | None]]
    if by_group:
        columns = {name: [_group_cycles(point.cost, name) for point in fitting] for name in GROUPS}
    else:
        columns = {name: [quantity(point.cost) for point in fitting] for name, quantity in QUANTITIES.items()}
    return [
        Line(name, x, np.array(column, np.float64) / divisor)
        for name, column in columns.items()
        if all(column) and not (per_image and name in BATCH_INDEPENDENT)
    ]


def _x(point: Point) -> float:
    return float(point.value**2 if point.varied == SIZE else point.value)


def _group_cycles(cost: Cost, group: str) -> int:
    return sum(cycles for part, cycles in cost.cycles_by_part.items() if group_of(part) == group)


def series(points: Sequence[Point], varied: str) -> list[list[Point]]:
    """Return the points that vary a quantity, one list per window, the configuration's own first."""
    chosen = [point for point in points if point.varied == varied]
    windows = dict.fromkeys(point.window for point in chosen)
    return [[point for point in chosen if point.window == window] for window in windows]


def table(points: Sequence[Point]) -> str:
    """Format the costs and how they grow as a table per varied quantity."""
    header = f"{'images':>8}{'M cycles':>10}{'TFLOP':>8}{'GB':>10}{'temp GiB':>10}{'collectives MB':>16}"
    text = []
    for varied, axis in AXES.items():
        per_image = varied == SIZE
        for one in series(points, varied):
            window = f", model.window {one[0].window}" if per_image and one[0].window else ""
            text += [f"\n{varied}{window}, {_unit(varied)}:", f"{axis:>28}{header}"]
            for point in sorted(one, key=lambda point: point.value):
                cost, divisor = point.cost, point.batch_per_chip if per_image else 1
                numbers = [
                    _number(cost.cycles, 1e6 * divisor, 10, 2),
                    _number(cost.flops, 1e12 * divisor, 8, 3),
                    _number(cost.bytes_accessed, 1e9 * divisor, 10, 2),
                    _number(cost.temp_bytes, GIB * divisor, 10, 3),
                    _number(None if per_image else cost.collective_bytes, 1e6, 16, 1),
                ]
                text.append(f"{point.value:28,}{point.batch_per_chip:8}{''.join(numbers)}  {cost.reason}")
            text.append(f"{FIT_TITLES[per_image]:>28}")
            for by_group in (False, True):
                text += [f"{_label(line, varied):>28}" for line in fit_lines(one, by_group=by_group)]
    return "\n".join(line.rstrip() for line in text).strip()


def _unit(varied: str) -> str:
    return "per image" if varied == SIZE else "per chip and step"


def _number(value: float | None, scale: float, width: int, digits: int) -> str:
    return f"{'-' if value is None else f'{value / scale:,.{digits}f}':>{width}}"


def _label(line: Line, varied: str) -> str:
    return f"{line.name}: " + (f"{line.exponent:.2f}" if varied == SIZE else f"{line.deviation:.1%}")


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw one row per varied quantity: costs of the whole step, and cycles by part of the model if known.

    For the image size both axes are logarithmic and a dotted line has slope 1. The other rows have linear axes and
    fitted straight lines.

    Args:
        points: to draw.
        title: of the figure.
        path: of the image file to write.

    Raises:
        UserError: if too few points fit in memory.
    """
    import matplotlib.figure

    shown = [varied for varied in AXES if any(fit_lines(one, by_group=False) for one in series(points, varied))]
    require(bool(shown), "--growth: no quantity has two variants that fit in memory; choose a smaller batch_size")
    columns = 2 if any(point.cost.cycles_by_part for point in points) else 1
    figure = matplotlib.figure.Figure(figsize=(5.4 * columns, 3.7 * len(shown) + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, varied in enumerate(shown):
        for column in range(columns):
            _draw_panel(axes[row][column], points, varied, by_group=column == 1)
    figure.savefig(path, dpi=90)


def _draw_panel(axes: "Axes", points: Sequence[Point], varied: str, *, by_group: bool) -> None:
    per_image = varied == SIZE
    base, *others = series(points, varied)
    base_x, guide = _x(base[0]), 0.0
    names = GROUPS if by_group else tuple(QUANTITIES)
    scales: dict[str, float] = {}
    for number, one in enumerate((base, *others)):
        for line in fit_lines(one, by_group=by_group):
            if number == 0:
                base_y = float(line.y[list(line.x).index(base_x)])
                scales[line.name] = 1e6 if by_group else base_y
                guide = max(guide, base_y / scales[line.name])
            if line.name not in scales:
                continue
            y = line.y / scales[line.name]
            color = f"C{names.index(line.name)}"
            label, face = (_label(line, varied), color) if number == 0 else (None, "white")
            axes.plot(line.x, y, "o", color=color, markerfacecolor=face, label=label)
            fitted = y if per_image else np.polyval(np.polyfit(line.x, y, 1), line.x)
            axes.plot(line.x, fitted, "-" if number == 0 else "--", color=color, linewidth=1)
    ticks = {_x(point): f"{point.value}" for point in points if point.varied == varied}
    top = axes.get_ylim()[1]
    if per_image:
        axes.set_xscale("log")
        axes.set_yscale("log")
        x = np.array(sorted(ticks))
        axes.plot(x, guide * x / base_x, ":", color="black", label="proportional: 1")
        axes.set_ylim(top=10 * top)  # room for the legend
    else:
        axes.set_ylim(0, 1.5 * top)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)
    windows = f" (model.window {base[0].window}; hollow: {others[0][0].window})" if per_image and others else ""
    axes.set_xlabel(AXES[varied] + windows)
    unit = _unit(varied)
    axes.set_ylabel(f"M cycles {unit}" if by_group else f"{unit}, relative to {base[0].value}")
    axes.grid(alpha=0.3)
    axes.legend(title=FIT_TITLES[per_image], fontsize="x-small", title_fontsize="x-small", ncols=2, loc="upper left")
