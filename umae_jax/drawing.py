"""Pictures of images with the boxes, masks, classes and scores of their objects."""

import colorsys
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from umae_jax.data.instances import Region
from umae_jax.errors import printable

MIN_SIDE = 480  # pixels; smaller images are enlarged by a whole number, so that text is legible
MAX_ENLARGED_SIDE = 4096  # pixels of the longer side; a strip is enlarged less
MASK_OPACITY = 0.45
GOLDEN_RATIO = 0.618  # of the hue circle; colours of neighbouring classes differ
CELL = (640, 480)  # width and height of an image on a sheet, pixels
BACKGROUND, TEXT = (255, 255, 255), (30, 30, 30)
MARGIN, LINE_HEIGHT = 8, 22  # pixels


def class_color(label: int) -> tuple[int, int, int]:
    """Return the colour of a class, RGB from 0 to 255."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_RATIO % 1, 0.85, 1 if label % 2 == 0 else 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    scores: np.ndarray | None = None,
    masks: Sequence[Region | None] = (),
) -> np.ndarray:
    """Draw objects on an image, uint8 [H, W, 3]; small images are enlarged.

    Captions that would cover another one are left out: those of low scores first or, without scores, of small boxes.

    Args:
        image: uint8 [H, W, 3].
        boxes: x1 y1 x2 y2 in its pixels, [N, 4].
        labels: int [N].
        classes: their names.
        scores: from 0 to 1, [N].
        masks: of the objects, in the image's pixels; empty for none.
    """
    colors = [class_color(int(label)) for label in labels]
    pixels = image.astype(np.float32)
    for mask, color in zip(masks, colors, strict=False):
        if mask is not None:
            rows, columns = mask.pixels.shape
            part = pixels[mask.top : mask.top + rows, mask.left : mask.left + columns]
            shown = mask.pixels[: part.shape[0], : part.shape[1], None] > 0
            np.copyto(part, (1 - MASK_OPACITY) * part + MASK_OPACITY * np.array(color, np.float32), where=shown)
    zoom = max(1, min(-(-MIN_SIDE // max(1, min(image.shape[:2]))), MAX_ENLARGED_SIDE // max(1, *image.shape[:2])))
    picture = Image.fromarray(pixels.round().astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1))
    side = min(picture.size)
    font, width = ImageFont.load_default(max(13, side // 40)), max(2, side // 300)
    canvas = ImageDraw.Draw(picture)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * zoom
    for (x1, y1, x2, y2), color in zip(boxes.tolist(), colors, strict=True):
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=width)
    order = np.argsort(-(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if scores is None else np.asarray(scores)))
    taken: list[tuple[float, float, float, float]] = []
    for index in order.tolist():
        text = classes[int(labels[index])] + (f" {scores[index]:.2f}" if scores is not None else "")
        place = _caption_place(canvas.textbbox((0, 0), text, font), boxes[index], picture.size)
        if any(place[0] < x2 and x1 < place[2] and place[1] < y2 and y1 < place[3] for x1, y1, x2, y2 in taken):
            continue
        taken.append(place)
        dark = np.dot(colors[index], (0.299, 0.587, 0.114)) < 140
        canvas.rectangle(place, fill=colors[index])
        canvas.text((place[0] + 2, place[1]), text, (255, 255, 255) if dark else (0, 0, 0), font)
    return np.asarray(picture)


def _caption_place(
    extent: tuple[float, float, float, float], box: np.ndarray, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the place of a caption: above its box, or inside if there is no room, within the picture."""
    width, height = extent[2] + 4, extent[3] + 3
    left = max(0.0, min(float(box[0]), size[0] - width))
    top = float(box[1]) - height if box[1] >= height else float(box[1])
    top = max(0.0, min(top, size[1] - height))
    return left, top, left + width, top + height


def encode_png(pixels: np.ndarray) -> bytes:
    """Return pixels, uint8 [H, W, 3], as a PNG file."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def draw_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 2) -> np.ndarray:
    """Draw pictures of any sizes on one sheet, each with a caption: uint8 [H, W, 3].

    Args:
        pictures: uint8 [H, W, 3]; they are reduced to CELL, never enlarged.
        captions: of the pictures, one line each.
        columns: number of pictures per row.
    """
    columns = max(1, min(columns, len(pictures)))
    width, height = CELL[0] + MARGIN, CELL[1] + LINE_HEIGHT + MARGIN
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), BACKGROUND)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = MARGIN + index % columns * width, MARGIN + index // columns * height
        picture = Image.fromarray(pixels)
        picture.thumbnail(CELL)
        sheet.paste(picture, (left, top))
        caption = printable(caption)
        while caption and canvas.textlength(caption, font) > CELL[0]:
            caption = caption[1:]  # the end of a path says more
        canvas.text((left, top + picture.height + 2), caption, TEXT, font)
    return np.asarray(sheet)
