"""Pictures of what a masked autoencoder saw and predicted."""

import functools
import io
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from umae_jax.data.on_device import denormalize, normalize, sample_keys
from umae_jax.masking import Mask, expand
from umae_jax.models.masked import MaskedImageModel
from umae_jax.patches import patchify, unpatchify

NOT_SAMPLED = (190, 190, 190)
HIDDEN = (70, 90, 140)
PAPER, INK = (255, 255, 255), (30, 30, 30)
NEAREST = 4  # visible units whose statistics stand in for an unseen unit's
STATISTICS = {
    "visible": f"de-normalised with the statistics of the {NEAREST} nearest visible units",
    "unit": "de-normalised with each unit's own true statistics, which give its brightness and contrast away",
}
PLAIN = "pixels as predicted"
COLUMNS = ("original", "what the encoder saw", "prediction in what was visible", "prediction alone")
MARGIN, LINE = 8, 22
MIN_WIDTH = 200  # of a panel, in pixels: room for its heading


class Panels(NamedTuple):
    """The four panels of each image, uint8 [B, H, W, C], and the mean squared error of each image, float32 [B].

    Where a panel shows no pixels it holds 0; `sampled` and `hidden`, bool [B, H, W], say why.
    """

    original: jax.Array
    seen: jax.Array
    pasted: jax.Array
    predicted: jax.Array
    sampled: jax.Array
    hidden: jax.Array
    error: jax.Array


def _nearest_statistics(model: MaskedImageModel, images: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Mean and variance for each unit not sampled, from the nearest visible ones, weighted by inverse square distance.

    Returns two arrays [B, 3, cell rows, cell columns, 1], in the order of `masked_units`.
    """
    units = patchify(mask.compact(images), model.unit)  # [B, rows, columns, unit pixels]
    batch = units.shape[0]
    rows, columns = model.cells
    grid = jnp.stack(jnp.meshgrid(jnp.arange(2 * rows), jnp.arange(2 * columns), indexing="ij"), -1)
    everywhere = jnp.broadcast_to(grid.reshape(1, -1, 1, 2), (batch, 4 * rows * columns, 1, 2))
    sampled = mask.compact(grid[None]).reshape(batch, 1, -1, 2)
    distance = jnp.square((everywhere - sampled).astype(jnp.float32)).sum(-1)  # [B, units, sampled units]
    distance = jnp.where(mask.hidden.reshape(batch, 1, -1), jnp.inf, jnp.maximum(distance, 1e-3))
    closeness, nearest = jax.lax.top_k(1 / distance, min(NEAREST, rows * columns))
    weights = closeness / closeness.sum(-1, keepdims=True)

    def spread(statistic: jax.Array) -> jax.Array:
        chosen = jax.vmap(lambda values, places: values[places])(statistic.reshape(batch, -1), nearest)
        whole = (weights * chosen).sum(-1).reshape(batch, 2 * rows, 2 * columns, 1)
        return mask.masked_units(whole)

    return spread(units.mean(-1)), spread(units.var(-1, ddof=1))


def reconstruct(
    model: MaskedImageModel,
    images: jax.Array,
    mask: Mask,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    statistics: str,
) -> Panels:
    """Predict the units that were not sampled and put them in their places.

    Args:
        images: uint8 [B, H, W, C].
        statistics: one of STATISTICS; without effect on a model that predicts plain pixels.
    """
    pixels = normalize(images, mean, std)
    _, prediction = model(pixels, mask)
    target = model.target(pixels, mask)
    error = jnp.square(prediction - target).mean((1, 2, 3, 4))
    if model.norm_pix_loss:
        if statistics == "unit":
            own = model.masked_pixels(pixels, mask)
            average, variance = own.mean(-1, keepdims=True), own.var(-1, keepdims=True, ddof=1)
        else:
            average, variance = _nearest_statistics(model, pixels, mask)
        prediction = prediction * jnp.sqrt(variance + 1e-6) + average
    batch = images.shape[0]
    flat = prediction.reshape(batch * 3, *prediction.shape[2:])
    predicted = unpatchify(flat, model.unit)
    predicted = predicted.reshape(batch, 3, *predicted.shape[1:])  # [B, 3, H / 2, W / 2, C]
    nothing = jnp.zeros((1, 1, 1, 1, 1), jnp.uint8)
    sampled_pixels = mask.compact(images)
    hidden = expand(mask.hidden, model.unit)[..., None]
    visible = jnp.where(hidden, jnp.uint8(0), sampled_pixels)
    predicted_pixels = denormalize(predicted, mean, std)
    sampled_flags = mask.assemble(jnp.ones_like(hidden), nothing > 0)
    hidden_flags = mask.assemble(hidden, nothing > 0)
    return Panels(
        original=images,
        seen=mask.assemble(visible, nothing),
        pasted=mask.assemble(visible, predicted_pixels),
        predicted=mask.assemble(jnp.zeros_like(visible), predicted_pixels),
        sampled=sampled_flags[..., 0],
        hidden=hidden_flags[..., 0],
        error=error,
    )


def draw(panels: Panels, caption: str) -> bytes:
    """Lay panels out, a row an image, with headings and a caption: a PNG."""
    original, seen, pasted, predicted, sampled, hidden = (np.asarray(panel) for panel in panels[:6])
    sampled, hidden = sampled[..., None], hidden[..., None]

    def paint(pixels: np.ndarray, *fills: tuple[np.ndarray, tuple[int, int, int]]) -> np.ndarray:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
        for where, colour in fills:
            pixels = np.where(where, np.array(colour, np.uint8), pixels)
        return pixels

    columns = (
        paint(original),
        paint(seen, (~sampled, NOT_SAMPLED), (hidden, HIDDEN)),
        paint(pasted, (hidden, HIDDEN)),
        paint(predicted, (sampled, NOT_SAMPLED)),
    )
    rows, height, width = columns[0].shape[:3]
    zoom = -(-MIN_WIDTH // width)  # small images are shown larger, pixel by pixel
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(13)
    lines = [
        caption,
        "light gray: not sampled. blue: sampled, but hidden by secondary masking (never predicted).",
    ]
    size = (
        MARGIN + len(columns) * (width + MARGIN),
        MARGIN + LINE + rows * (height + MARGIN) + len(lines) * LINE,
    )
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (heading, images) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = MARGIN + number * (width + MARGIN)
        pen.text((left, MARGIN), heading, INK, font)
        for row, pixels in enumerate(images):
            panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(panel, (left, MARGIN + LINE + row * (height + MARGIN)))
    for number, line in enumerate(lines):
        pen.text((MARGIN, size[1] - (len(lines) - number) * LINE), line, INK, font)
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    return encoded.getvalue()


def make_illustrator(
    graph: nnx.GraphDef,
    images: np.ndarray,
    *,
    seed: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    statistics: str = "visible",
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[nnx.State, str], bytes]:
    """Fix images and masks; the function returned draws them with the parameters and the title it is given.

    Args:
        graph: of a `MaskedImageModel`.
        images: uint8 [B, H, W, C].
        seed: of the masks.
        statistics: one of STATISTICS.
        sharding: where what is computed goes, so that every process can read it; None where there is one.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def compute(params: nnx.State, images: jax.Array) -> Panels:
        model = nnx.merge(graph, params)
        mask = model.sample_mask(sample_keys(seed, jnp.arange(images.shape[0], dtype=jnp.uint32)))
        return reconstruct(model, images, mask, mean=mean, std=std, statistics=statistics)

    def illustrate(params: nnx.State, title: str) -> bytes:
        panels = compute(params, images)
        how = STATISTICS[statistics] if nnx.merge(graph, params).norm_pix_loss else PLAIN
        return draw(panels, f"{title}  |  error {np.asarray(panels.error).mean():.4f}  |  {how}")

    return illustrate
