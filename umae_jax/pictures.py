"""Pictures of a masked image model's input and predictions."""

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
BACKGROUND, TEXT = (255, 255, 255), (30, 30, 30)
NEIGHBORS = 4  # visible units whose mean and std replace those of a masked unit
STATISTICS = {
    "visible": f"de-normalised with the mean and std of the {NEIGHBORS} nearest visible units",
    "unit": "de-normalised with the true mean and std of each unit, which reveal its brightness and contrast",
}
PLAIN = "pixels as predicted"
COLUMNS = ("original", "encoder input", "prediction and visible pixels", "prediction")
LEGEND = "light gray: not sampled. blue: sampled, but hidden by secondary masking (never predicted)."
MARGIN, LINE_HEIGHT = 8, 22  # pixels
MIN_WIDTH = 200  # pixels of a panel, so that its heading fits


class Panels(NamedTuple):
    """Panels of each image, uint8 [B, H, W, C], with 0 where a panel shows no pixels.

    Attributes:
        original: the images.
        visible: pixels that the encoder sees.
        pasted: the prediction and the visible pixels.
        predicted: the prediction.
        sampled: pixels of sampled units, bool [B, H, W, 1].
        hidden: pixels hidden by secondary masking, bool [B, H, W, 1].
        error: mean squared error of each image's prediction, float32 [B].
    """

    original: jax.Array
    visible: jax.Array
    pasted: jax.Array
    predicted: jax.Array
    sampled: jax.Array
    hidden: jax.Array
    error: jax.Array


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Invert `Encoder.normalize`, rounded and clipped: float32 [..., C] -> uint8 [..., C]."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    pixels = images * jnp.asarray(std, jnp.float32).reshape(shape) + jnp.asarray(mean, jnp.float32).reshape(shape)
    return jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)


def _visible_statistics(model: MaskedImageModel, images: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Estimate mean and variance of the masked units from the nearest visible units, by inverse squared distance.

    Args:
        model: determines unit and cells.
        images: normalised, float32 [B, H, W, C].
        mask: of the images.

    Returns:
        Mean and variance, each float32 [B, 3, cell rows, cell columns, 1], in the order of `Mask.masked_units`.
    """
    units = patchify(mask.compact(images), model.unit)  # [B, rows, columns, unit pixels]
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
    """Predict the masked units of uint8 images [B, H, W, C] and arrange them as images.

    `statistics`, a key of STATISTICS, de-normalises the prediction; it is ignored if the model predicts plain pixels.
    """
    encoder = model.encoder
    _, prediction = model(images, mask)
    error = jnp.square(prediction - model.target(images, mask)).mean((1, 2, 3, 4))
    if model.norm_pix_loss:
        if statistics == "unit":
            pixels = encoder.normalize(model.masked_pixels(images, mask))
            mean, variance = pixels.mean(-1, keepdims=True), pixels.var(-1, keepdims=True, ddof=1)
        else:
            mean, variance = _visible_statistics(model, encoder.normalize(images), mask)
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


def draw(panels: Panels, caption: str) -> bytes:
    """Draw panels as a PNG: one row per image, a heading per column, a caption below."""
    original, visible, pasted, predicted, sampled, hidden, _ = jax.device_get(panels)
    visible = np.where(sampled, visible, NOT_SAMPLED)
    columns = (
        original,
        np.where(hidden, HIDDEN, visible),
        np.where(hidden, HIDDEN, pasted),
        np.where(sampled, NOT_SAMPLED, predicted),
    )
    rows, height, width, _ = original.shape
    zoom = -(-MIN_WIDTH // width)  # small images are enlarged by whole pixels
    height, width = height * zoom, width * zoom
    lines, font = [caption, LEGEND], ImageFont.load_default(13)
    size = (
        MARGIN + len(columns) * (width + MARGIN),
        MARGIN + LINE_HEIGHT + rows * (height + MARGIN) + len(lines) * LINE_HEIGHT,
    )
    sheet = Image.new("RGB", size, BACKGROUND)
    canvas = ImageDraw.Draw(sheet)
    for column, (heading, images) in enumerate(zip(COLUMNS, columns, strict=True)):
        x = MARGIN + column * (width + MARGIN)
        canvas.text((x, MARGIN), heading, TEXT, font)
        for row, pixels in enumerate(np.broadcast_to(images, (*images.shape[:3], 3))):
            panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(panel, (x, MARGIN + LINE_HEIGHT + row * (height + MARGIN)))
    for number, line in enumerate(lines):
        canvas.text((MARGIN, size[1] - (len(lines) - number) * LINE_HEIGHT), line, TEXT, font)
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    return encoded.getvalue()


def make_illustrator(
    graph: nnx.GraphDef,
    images: np.ndarray,
    *,
    seed: int,
    statistics: str = "visible",
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[nnx.State, str], bytes]:
    """Return a function of parameters and a title that draws fixed images under fixed masks, as a PNG.

    Args:
        graph: graph definition of a `MaskedImageModel`.
        images: uint8 [B, H, W, C].
        seed: of the masks.
        statistics: a key of STATISTICS.
        sharding: of the panels; with several processes, one that every process can read.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def compute(params: nnx.State, images: jax.Array) -> Panels:
        model = nnx.merge(graph, params)
        mask = model.sample_mask(sample_keys(seed, jnp.arange(images.shape[0], dtype=jnp.uint32)))
        return reconstruct(model, images, mask, statistics=statistics)

    def illustrate(params: nnx.State, title: str) -> bytes:
        panels = compute(params, images)
        scale = STATISTICS[statistics] if nnx.merge(graph, params).norm_pix_loss else PLAIN
        return draw(panels, f"{title}  |  error {np.asarray(panels.error).mean():.4f}  |  {scale}")

    return illustrate
