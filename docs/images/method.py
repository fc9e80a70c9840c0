"""Draw docs/images/method.png from a picture that a pre-training run wrote.

    python docs/images/method.py runs/quickstart/reconstructions/0000797.png

The image, its mask, the compact grid and the reconstruction are cut out of that picture. The compact grid is what the
encoder receives: the sampled unit of each cell of 2 x 2 units.
"""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

# Layout of the picture, in pixels: panels of SIDE, MARGIN between them, the headings of LINE above.
SIDE, MARGIN, LINE = 256, 8, 22
NOT_SAMPLED = (190, 190, 190)
UNITS = 16  # mask units per side of an image of the quickstart
OUTPUT = Path(__file__).with_suffix(".png")
ROW = 0  # row of the picture whose way through the model is shown
SIZE = (9.6, 4.1)  # inches
ASPECT = SIZE[0] / SIZE[1]
EXAMPLES = (2, 3, 4)  # rows whose reconstructions are shown below


def panels(picture: np.ndarray, row: int) -> list[np.ndarray]:
    """Return the four panels of a row of the picture: original, visible, reconstruction, prediction alone."""
    top = MARGIN + LINE + row * (SIDE + MARGIN)
    lefts = [MARGIN + column * (SIDE + MARGIN) for column in range(4)]
    return [picture[top : top + SIDE, left : left + SIDE] for left in lefts]


def units_of(panel: np.ndarray) -> np.ndarray:
    """Cut a panel into its units: [UNITS, UNITS, unit, unit, 3]."""
    unit = SIDE // UNITS
    return panel.reshape(UNITS, unit, UNITS, unit, 3).swapaxes(1, 2)


def compact(visible: np.ndarray) -> np.ndarray:
    """Lay the sampled unit of each cell side by side; the result has half the side of the panel."""
    units = units_of(visible)
    sampled = ~(units == NOT_SAMPLED).all((2, 3, 4))
    rows = []
    for row in range(0, UNITS, 2):
        cells = []
        for column in range(0, UNITS, 2):
            cell = units[row : row + 2, column : column + 2].reshape(4, *units.shape[2:])
            (index,) = np.flatnonzero(sampled[row : row + 2, column : column + 2])
            cells.append(cell[index])
        rows.append(np.concatenate(cells, 1))
    return np.concatenate(rows)


def show(axes: Axes, image: np.ndarray, title: str, cells: int = 0) -> None:
    """Show an image under a title, with the borders of its cells if there are any."""
    axes.imshow(image, interpolation="nearest")
    for line in range(1, cells):
        place = line * image.shape[0] / cells - 0.5
        axes.axhline(place, color="white", linewidth=0.8)
        axes.axvline(place, color="white", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def draw(picture: np.ndarray, step: int) -> Figure:
    """Draw the path of one image through the model, and reconstructions of others below."""
    figure = Figure(figsize=SIZE, facecolor="white")
    side, top = 0.2, 0.4  # of a panel; its lower edge, in shares of the figure
    height = side * ASPECT
    original, visible, reconstruction, _ = panels(picture, ROW)
    lefts = (0.01, 0.265, 0.79)
    show(figure.add_axes((lefts[0], top, side, height)), original, "image")
    show(
        figure.add_axes((lefts[1], top, side, height)),
        visible,
        "uniform sampling: one unit of every 2 x 2;\nblue: sampled, then hidden",
        cells=UNITS // 2,
    )
    show(
        figure.add_axes((0.555, top + height / 4, side / 2, height / 2)),
        compact(visible),
        "compact grid:\nencoder input",
    )
    show(figure.add_axes((lefts[2], top, side, height)), reconstruction, "reconstruction")
    middle = top + height / 2
    for start, end, label in ((0.215, 0.26, ""), (0.47, 0.55, "compact"), (0.66, 0.785, "encoder,\nthen decoder")):
        arrow = FancyArrowPatch((start, middle), (end, middle), arrowstyle="-|>", mutation_scale=14, color="black")
        figure.add_artist(arrow)
        figure.text((start + end) / 2, middle + 0.025, label, ha="center", va="bottom", fontsize=8)
    small = 0.105
    for place, row in enumerate(EXAMPLES):
        image, seen, reconstructed, _ = panels(picture, row)
        for column, panel in enumerate((image, seen, reconstructed)):
            left = 0.01 + place * 0.3275 + column * (small + 0.004)
            show(figure.add_axes((left, 0.08, small, small * ASPECT)), panel, "")
    caption = f"The quickstart after {step} steps on 15 photographs: image, encoder input, reconstruction."
    figure.text(0.01, 0.02, caption, fontsize=8)
    return figure


def main(path: str) -> None:
    """Draw the figure and write it with a palette, which keeps the file small."""
    with Image.open(path) as image:
        figure = draw(np.asarray(image.convert("RGB")), int(Path(path).stem))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(OUTPUT, optimize=True)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size:,} bytes")  # noqa: T201 - the result


if __name__ == "__main__":
    main(*sys.argv[1:])
