"""A strip of one reconstruction over time, cut out of the pictures that a run has drawn."""

import io

import numpy as np
from PIL import Image

from umae_jax.files import AnyPath
from umae_jax.pictures import COMPLETED, INPUT, LEGEND, ORIGINAL, draw_table, panel

MAX_STEPS, MAX_IMAGES = 8, 2  # in a strip
MAX_WIDTH = 160  # pixels of a panel


def draw_progress(folder: AnyPath, image_size: tuple[int, int], images: int) -> bytes | None:
    """Draw the first images, their encoder input, and their reconstructions at evenly spaced steps, as a PNG.

    Args:
        folder: pictures STEP.png that `pictures.draw` has drawn; others are skipped.
        image_size: height and width of the images.
        images: number of images per picture.

    Returns:
        The PNG, or None if no picture can be read.
    """
    files = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}
    rows = range(min(images, MAX_IMAGES))
    columns: dict[str, list[np.ndarray]] = {}
    for step in _evenly_spaced(sorted(files)):
        try:
            with Image.open(io.BytesIO(files[step].read_bytes())) as sheet:
                drawn = {
                    name: [_shrink(panel(sheet, image_size, row, name)) for row in rows]
                    for name in (ORIGINAL, INPUT, COMPLETED)
                }
        except (OSError, ValueError):  # damaged, or of other images
            continue
        columns |= {ORIGINAL: drawn[ORIGINAL], INPUT: drawn[INPUT], f"step {step:,}": drawn[COMPLETED]}
    if not columns:
        return None
    table = np.stack([np.stack(column) for column in columns.values()], axis=1)
    caption = f"{COMPLETED} of the same images, under the same masks, after each step"
    return draw_table(table, list(columns), [caption, LEGEND])


def _evenly_spaced(steps: list[int]) -> list[int]:
    """Return the first, the last and up to MAX_STEPS - 2 steps between, near to evenly spaced ones."""
    if not steps:
        return []
    targets = np.linspace(steps[0], steps[-1], MAX_STEPS)
    return sorted({min(steps, key=lambda step: abs(step - target)) for target in targets})


def _shrink(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, at most MAX_WIDTH wide: uint8 [H, W, 3]."""
    image = image.convert("RGB")
    image.thumbnail((MAX_WIDTH, image.height), Image.Resampling.LANCZOS)
    return np.asarray(image)
