"""Pictures of the input and the predictions of a masked image model."""

import functools
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from umae_jax.data.on_device import sample_keys
from umae_jax.masking import Mask, expand
from umae_jax.models.masked import MaskedImageModel
from umae_jax.patches import patchify, unpatchify

NOT_SAMPLED, HIDDEN = np.array([190, 190, 190], np.uint8), np.array([70, 90, 140], np.uint8)
BACKGROUND, TEXT = 255, (30, 30, 30)
NEIGHBORS = 4  # visible units that give a masked unit its mean and std
STATISTICS = {
    "visible": f"de-normalised with the mean and std of the {NEIGHBORS} nearest visible units",
    "unit": "de-normalised with the true mean and std of each unit, which reveal its brightness and contrast",
}
PLAIN = "pixels as predicted"
LEGEND = "light gray: not sampled. blue: sampled, but hidden by secondary masking (never predicted)."
ORIGINAL, INPUT, COMPLETED = "original", "encoder input", "prediction and visible pixels"  # the first columns
MARGIN, LINE_HEIGHT = 8, 22  # pixels
MIN_WIDTH = 200  # pixels; a panel is no narrower than its heading


class Panels(NamedTuple):
    """Panels of each image: pixels uint8 [B, H, W, C], 0 where a panel shows none, and flags bool [B, H, W, 1]."""

    original: jax.Array
    visible: jax.Array  # pixels that the encoder sees
    pasted: jax.Array  # prediction and visible pixels
    predicted: jax.Array
    sampled: jax.Array  # flags of sampled units
    hidden: jax.Array  # flags of units hidden by secondary masking
    error: jax.Array  # mean squared error over the units not sampled, in the target's pixels, float32 [B]


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Invert `Encoder.normalize`, rounded and clipped: float32 [..., C] -> uint8 [..., C]."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    pixels = images * jnp.asarray(std, jnp.float32).reshape(shape) + jnp.asarray(mean, jnp.float32).reshape(shape)
    return jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)


def _visible_statistics(images: jax.Array, mask: Mask, unit: int) -> tuple[jax.Array, jax.Array]:
    """Interpolate mean and variance of the masked units from the nearest visible ones, by inverse squared distance.

    Args:
        images: normalised, float32 [B, H, W, C].
        mask: of the images.
        unit: pixels along a unit's side.

    Returns:
        Mean and variance, each float32 [B, 3, cell rows, cell columns, 1], in the order of `Mask.masked_units`.
    """
    units = patchify(mask.compact(images), unit)  # [B, rows, columns, unit pixels]
    batch, rows, columns, _ = units.shape
    grid = jnp.stack(jnp.meshgrid(jnp.arange(2 * rows), jnp.arange(2 * columns), indexing="ij"), -1)
    sampled = mask.compact(grid[None]).reshape(batch, 1, -1, 2)
    distance = jnp.square((grid.reshape(1, -1, 1, 2) - sampled).astype(jnp.float32)).sum(-1)  # [B, units, sampled]
    distance = jnp.where(mask.hidden.reshape(batch, 1, -1), jnp.inf, jnp.maximum(distance, 1e-3))
    closeness, nearest = jax.lax.top_k(1 / distance, min(NEIGHBORS, rows * columns))
    weights = closeness / closeness.sum(-1, keepdims=True)

    def interpolate(statistic: jax.Array) -> jax.Array:
        neighbors = jnp.take_along_axis(statistic.reshape(batch, 1, -1), nearest, axis=-1)
        return mask.masked_units((weights * neighbors).sum(-1).reshape(batch, 2 * rows, 2 * columns, 1))

    return interpolate(units.mean(-1)), interpolate(units.var(-1, ddof=1))


def reconstruct(model: MaskedImageModel, images: jax.Array, mask: Mask, *, statistics: str) -> Panels:
    """Predict the masked units of uint8 images [B, H, W, C] and put them into their places.

    `statistics`, a key of STATISTICS, de-normalises the prediction; a model that predicts plain pixels ignores it.
    """
    encoder = model.encoder
    _, prediction = model(images, mask)
    error = jnp.square(prediction - model.target(images, mask)).mean((1, 2, 3, 4))
    if model.norm_pix_loss:
        if statistics == "unit":
            pixels = encoder.normalize(model.masked_pixels(images, mask))
            mean, variance = pixels.mean(-1, keepdims=True), pixels.var(-1, keepdims=True, ddof=1)
        else:
            mean, variance = _visible_statistics(encoder.normalize(images), mask, model.unit)
        prediction = prediction * jnp.sqrt(variance + 1e-6) + mean
    batch = images.shape[0]
    predicted = unpatchify(prediction.reshape(batch * 3, *prediction.shape[2:]), model.unit)
    predicted = predicted.reshape(batch, 3, *predicted.shape[1:])  # [B, 3, H / 2, W / 2, C]
    predicted = denormalize(predicted, encoder.mean, encoder.std)
    blank = jnp.zeros((1, 1, 1, 1, 1), jnp.uint8)
    hidden = expand(mask.hidden, model.unit)[..., None]
    visible = jnp.where(hidden, jnp.uint8(0), mask.compact(images))
    return Panels(
        original=images,
        visible=mask.assemble(visible, blank),
        pasted=mask.assemble(visible, predicted),
        predicted=mask.assemble(jnp.zeros_like(visible), predicted),
        sampled=mask.assemble(jnp.ones_like(hidden), blank > 0),
        hidden=mask.assemble(hidden, blank > 0),
        error=error,
    )


def draw(panels: Panels, captions: Sequence[str]) -> bytes:
    """Draw panels as a PNG: one row per image, a heading per column, captions below."""
    original, visible, pasted, predicted, sampled, hidden, _ = jax.device_get(panels)
    visible = np.where(sampled, visible, NOT_SAMPLED)
    columns = {
        ORIGINAL: np.broadcast_to(original, visible.shape),
        INPUT: np.where(hidden, HIDDEN, visible),
        COMPLETED: np.where(hidden, HIDDEN, pasted),
        "prediction": np.where(sampled, NOT_SAMPLED, predicted),
    }
    zoom = _zoom(original.shape[2])
    rows = np.stack([columns[name] for name in columns], axis=1).repeat(zoom, axis=2).repeat(zoom, axis=3)
    return draw_table(rows, list(columns), [*captions, LEGEND])


def draw_table(panels: np.ndarray, headings: Sequence[str], captions: Sequence[str]) -> bytes:
    """Draw a table of panels as a PNG.

    Args:
        panels: pixels, uint8 [rows, columns, H, W, 3].
        headings: of the columns.
        captions: lines below the table.
    """
    spaced = np.pad(panels, ((0, 0), (0, 0), (0, MARGIN), (0, MARGIN), (0, 0)), constant_values=BACKGROUND)
    rows, count, height, width, _ = spaced.shape
    table = spaced.transpose(0, 2, 1, 3, 4).reshape(rows * height, count * width, 3)
    border = ((MARGIN + LINE_HEIGHT, len(captions) * LINE_HEIGHT), (MARGIN, 0), (0, 0))
    sheet = Image.fromarray(np.pad(table, border, constant_values=BACKGROUND))
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, heading in enumerate(headings):
        canvas.text((MARGIN + column * width, MARGIN), heading, TEXT, font)
    for line, caption in enumerate(captions):
        canvas.text((MARGIN, sheet.height - (len(captions) - line) * LINE_HEIGHT), caption, TEXT, font)
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    return encoded.getvalue()


def panel(sheet: Image.Image, size: tuple[int, int], row: int, heading: str) -> Image.Image:
    """Cut a panel out of a picture that `draw` has drawn.

    Args:
        sheet: the picture.
        size: height and width of the images.
        row: of the image.
        heading: ORIGINAL, INPUT or COMPLETED.

    Raises:
        ValueError: if the picture has no such panel.
    """
    height, width = (side * _zoom(size[1]) for side in size)
    left = MARGIN + (ORIGINAL, INPUT, COMPLETED).index(heading) * (width + MARGIN)
    top = MARGIN + LINE_HEIGHT + row * (height + MARGIN)
    if left + width > sheet.width or top + height > sheet.height:
        raise ValueError(f"a picture of {sheet.width} x {sheet.height} pixels has no row {row} of {size}")
    return sheet.crop((left, top, left + width, top + height))


def _zoom(width: int) -> int:
    """Return the whole number that enlarges small images."""
    return -(-MIN_WIDTH // width)


def make_illustrator(
    graph: nnx.GraphDef,
    images: np.ndarray,
    *,
    seed: int,
    statistics: str = "visible",
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[nnx.State, str], bytes]:
    """Return a function that draws fixed images under fixed masks: (parameters, title) -> PNG.

    The caption gives the mean squared error over the units not sampled of these images, in the pixels that the model
    predicts. That is the loss of UM-MAE and MAE, but of other images than a training batch's.

    Args:
        graph: graph definition of a `MaskedImageModel`.
        images: uint8 [B, H, W, C].
        seed: of the masks.
        statistics: a key of STATISTICS.
        sharding: of the panels; replicated if there are several processes.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def compute(params: nnx.State, images: jax.Array) -> Panels:
        model = nnx.merge(graph, params)
        mask = model.sample_mask(sample_keys(seed, jnp.arange(images.shape[0], dtype=jnp.uint32)))
        return reconstruct(model, images, mask, statistics=statistics)

    def illustrate(params: nnx.State, title: str) -> bytes:
        panels = compute(params, images)
        norm_pix_loss, count = nnx.merge(graph, params).norm_pix_loss, images.shape[0]
        pixels = "pixels normalised per unit" if norm_pix_loss else "normalised pixels"
        error = f"mean squared error {np.asarray(panels.error).mean():.4f} over the units not sampled"
        of = "this image" if count == 1 else f"these {count} images"
        return draw(
            panels, [f"{title}  |  {error} of {of}, in {pixels}", STATISTICS[statistics] if norm_pix_loss else PLAIN]
        )

    return illustrate
