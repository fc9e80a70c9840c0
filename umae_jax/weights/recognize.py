"""Infer a model's configuration from the names and shapes of its state dict."""

import math
import re
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from umae_jax.config import ENCODERS, default_config
from umae_jax.errors import UserError, listing, require

Shapes = Mapping[str, tuple[int, ...]]

MARKERS = {"swin": ".posmlp.", "pvt": ".attn.sr.", "vit": "cls_token"}  # parts of names that occur in one encoder only
PATCH_EMBED = "patch_embed.proj.weight"
DECODER_WIDTH = 512  # of every preset; the number of decoder heads is known for this width only
USE_CONFIG = "name the model with --config FILE"


def recognize(tensors: Mapping[str, np.ndarray], name: str, *, encoder_only: bool = False) -> ConfigDict:
    """Infer the configuration of a model from its state dict with the reference's names.

    Settings that shapes do not determine take the paper's values: windows, sr_ratios, the ratio of secondary masking,
    normalised targets (except SimMIM) and, for the decoder of a pyramid, the reference's order of positions.

    Raises:
        UserError: naming the file, if the architecture is unknown, or shapes and defaults leave a setting open.
    """
    shapes = {key: array.shape for key, array in tensors.items()}
    encoder = next((encoder for encoder, marker in MARKERS.items() if any(marker in key for key in shapes)), None)
    if encoder is None:
        raise UserError(
            f"{name} holds an unknown architecture, with names such as {listing(sorted(shapes), 3)}: it is no Swin "
            "with a position MLP, no PVT with pooled attention and no ViT with a class token"
        )
    try:
        return _recognize(encoder, shapes, name, encoder_only)
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"without {error}" if isinstance(error, KeyError) else "of inconsistent shapes"
        raise UserError(f"{name} holds a {encoder} {problem}; {USE_CONFIG} for a list of all problems") from None


def _recognize(encoder: str, shapes: Shapes, name: str, encoder_only: bool) -> ConfigDict:
    if len(shapes[PATCH_EMBED]) != 4:
        raise ValueError  # not a convolution
    blocks = _count("blocks", shapes)
    starts = [block for block in range(blocks) if not block or f"blocks.{block}.downsample.proj.weight" in shapes]
    depths = tuple(end - start for start, end in zip(starts, (*starts[1:], blocks), strict=True))
    block_widths = [shapes[f"blocks.{block}.norm1.weight"][0] for block in range(blocks)]
    widths = tuple(block_widths[start] for start in starts)
    presets = {(size["widths"], size["depths"]): name for name, size in ENCODERS[encoder].sizes.items()}
    preset = presets.get((widths, depths))
    require(
        preset is not None or encoder == "swin",
        f"{name} holds a {encoder} of widths {widths} and depths {depths} with unknown heads; {USE_CONFIG}",
    )
    method, channels = _method(encoder, shapes), shapes[PATCH_EMBED][1]
    config = default_config(preset or "swin_tiny", method)
    require(
        channels == len(config.data.mean),
        f"{name} holds a model of {channels} channels with unknown mean and std; {USE_CONFIG}, with model.channels, "
        "data.mean and data.std",
    )
    model = config.model
    model.patch = shapes[PATCH_EMBED][2]
    model.widths, model.depths = widths, depths
    model.mlp_ratios = tuple(shapes[f"blocks.{start}.mlp.fc1.weight"][0] // block_widths[start] for start in starts)
    if encoder == "swin":
        model.heads = tuple(shapes[f"blocks.{start}.attn.posmlp.2.weight"][0] for start in starts)
        model.position_width = shapes["blocks.0.attn.posmlp.0.weight"][0]
    if method == "classifier":
        model.classes = shapes["head.weight"][0]
    if method in ("um_mae", "mae"):
        model.reference_order = encoder != "vit" and method == "um_mae"
        if not encoder_only:
            _recognize_decoder(model, shapes, name)
    config.image_size = _image_size(config, shapes, name)
    return config


def _count(blocks: str, shapes: Shapes) -> int:
    numbers = [int(match[1]) for key in shapes if (match := re.match(rf"{blocks}\.(\d+)\.", key))]
    if not numbers:
        raise KeyError(f"{blocks}.0")
    return 1 + max(numbers)


def _method(encoder: str, shapes: Shapes) -> str:
    if "head.weight" in shapes:
        return "classifier"
    if "decoder_pred.weight" in shapes and "decoder_embed.weight" not in shapes:
        return "simmim"
    # An encoder alone counts as a masked autoencoder without its decoder.
    return "mae" if encoder == "vit" and "vis_mask_token" not in shapes else "um_mae"


def _recognize_decoder(model: ConfigDict, shapes: Shapes, name: str) -> None:
    if "vis_mask_token" not in shapes:
        model.secondary_ratio = 0.0
    if "mask_token" not in shapes:
        return
    model.decoder_width = shapes["mask_token"][-1]
    model.decoder_depth = _count("decoder_blocks", shapes)
    model.decoder_factor = math.isqrt(shapes["decoder_embed.weight"][0] // model.decoder_width)
    require(
        model.decoder_width == DECODER_WIDTH,
        f"{name} holds a decoder of width {model.decoder_width} with unknown heads; {USE_CONFIG}",
    )


def _image_size(config: ConfigDict, shapes: Shapes, name: str) -> tuple[int, int]:
    model = config.model
    sides = {"pos_embed": model.patch}  # pixels per table entry
    if "decoder_factor" in model:
        sides["decoder_pos_embed"] = model.patch * 2 ** (len(model.depths) - 1) // model.decoder_factor
    for table, side in sides.items():
        if table in shapes:
            count = shapes[table][1] - (model.encoder == "vit")
            rows = math.isqrt(count)
            problem = f"{name} holds {table} for {count} patches of {side} pixels, which is no square"
            require(rows**2 == count, f"{problem}; {USE_CONFIG}, with image_size")
            return (rows * side,) * 2
    return (ENCODERS[model.encoder].image_side,) * 2
