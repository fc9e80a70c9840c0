"""Which model a state dict is of, told from its names and shapes."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from umae_jax.config import ENCODERS, default_config, from_json
from umae_jax.errors import UserError, require
from umae_jax.files import AnyPath
from umae_jax.weights.files import read_weights
from umae_jax.weights.huggingface import from_huggingface

PAPER_SIDE = {"swin": 256, "pvt": 256, "vit": 224}
NAME_IT = "name the model with --config FILE"


def recognize(tensors: Mapping[str, np.ndarray], name: str, *, encoder_only: bool = False) -> ConfigDict:
    """The configuration of the model whose state dict, by the reference's names, this is.

    What no shape tells is the paper's: windows, sr_ratios, the ratio of secondary masking, normalised targets (not
    for SimMIM) and, for a pyramid's decoder, the reference's order of positions, with which it was trained.

    Args:
        tensors: the state dict.
        name: of the file, for the error message.
        encoder_only: whether the decoder does not matter.

    Raises:
        UserError: if it is another architecture, or shapes leave open what there is no default for.
    """
    shapes = {key: array.shape for key, array in tensors.items()}
    markers = {"swin": ".posmlp.", "pvt": ".attn.sr.", "vit": "cls_token"}
    encoder = next((encoder for encoder, marker in markers.items() if any(marker in key for key in shapes)), None)
    if encoder is None or len(shapes.get("patch_embed.proj.weight", ())) != 4:
        raise UserError(
            f"{name} holds another architecture than this program's Swin, PVT or ViT: of its names, such as "
            f"{min(shapes)}, none belongs to the position MLP, the pooled attention or the class token of one of these"
        )
    try:
        config = _recognize(encoder, shapes, name, encoder_only)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{name} holds a {encoder} that lacks {error}; {NAME_IT} to be told all it lacks") from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{name} holds a {encoder} whose shapes do not fit together; {NAME_IT} to be told") from None
    return config


def _recognize(encoder: str, shapes: Mapping[str, tuple[int, ...]], name: str, encoder_only: bool) -> ConfigDict:
    blocks = _count("blocks", shapes)
    block_widths = [shapes[f"blocks.{block}.norm1.weight"][0] for block in range(blocks)]
    firsts = [block for block in range(blocks) if not block or f"blocks.{block}.downsample.proj.weight" in shapes]
    depths = tuple(end - first for first, end in zip(firsts, (*firsts[1:], blocks), strict=True))
    widths = tuple(block_widths[first] for first in firsts)
    preset = next(
        (
            size
            for size in ENCODERS[encoder].sizes.values()
            if (size["widths"], size["depths"]) == (widths, depths)
        ),
        None,
    )
    if encoder == "swin":
        heads = tuple(shapes[f"blocks.{first}.attn.posmlp.2.weight"][0] for first in firsts)
    elif preset is None:
        raise UserError(
            f"{name} holds a {encoder} of widths {widths} and depths {depths}, whose heads no shape tells; {NAME_IT}"
        )
    else:
        heads = preset["heads"]
    method, channels = _method(encoder, shapes), shapes["patch_embed.proj.weight"][1]
    config = default_config(next(iter(ENCODERS[encoder].sizes)), method)
    require(
        channels == len(config.data.mean),
        f"{name} holds a model of {channels} channels, of which nothing tells how they were normalised; {NAME_IT}, "
        "with model.channels, data.mean and data.std",
    )
    model = config.model
    model.update(
        {
            "patch": shapes["patch_embed.proj.weight"][2],
            "widths": widths,
            "depths": depths,
            "heads": heads,
            "mlp_ratios": tuple(shapes[f"blocks.{first}.mlp.fc1.weight"][0] // block_widths[first] for first in firsts),
        }
    )
    if method == "um_mae":
        model.reference_order = encoder != "vit"
    if encoder == "pvt":
        model.sr_ratios = tuple(2**stage for stage in reversed(range(len(depths))))
    if encoder == "swin":
        model.position_width = shapes["blocks.0.attn.posmlp.0.weight"][0]
    if method == "classifier":
        model.classes = shapes["head.weight"][0]
    if method in ("um_mae", "mae") and not encoder_only:
        _recognize_decoder(config, shapes, name)
    config.image_size = _image_size(config, shapes, name)
    return config


def _count(blocks: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    numbers = [int(match[1]) for key in shapes if (match := re.match(rf"{blocks}\.(\d+)\.", key))]
    if not numbers:
        raise KeyError(f"{blocks}.0")
    return 1 + max(numbers)


def _method(encoder: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if "head.weight" in shapes:
        return "classifier"
    if "decoder_pred.weight" in shapes and "decoder_embed.weight" not in shapes:
        return "simmim"
    # An encoder alone counts as the masked autoencoder's, whose decoder is then missing.
    return "mae" if encoder == "vit" and "vis_mask_token" not in shapes else "um_mae"


def _recognize_decoder(config: ConfigDict, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    model = config.model
    if "vis_mask_token" not in shapes:
        model.secondary_ratio = 0.0
    if "mask_token" not in shapes:
        return
    model.decoder_width = shapes["mask_token"][-1]
    model.decoder_depth = _count("decoder_blocks", shapes)
    model.decoder_factor = math.isqrt(shapes["decoder_embed.weight"][0] // model.decoder_width)
    require(
        model.decoder_width == 512,
        f"{name} holds a decoder of width {model.decoder_width}, whose heads no shape tells; {NAME_IT}",
    )


def _image_size(config: ConfigDict, shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    model = config.model
    unit = model.patch * 2 ** (len(model.depths) - 1) // model.get("decoder_factor", 1)
    for table, side in (("pos_embed", model.patch), ("decoder_pos_embed", unit)):
        if table in shapes:
            count = shapes[table][1] - (model.encoder == "vit")
            require(
                math.isqrt(count) ** 2 == count,
                f"{name} was trained on images that are not square, of {count} patches of {side} pixels; {NAME_IT}, "
                "with image_size",
            )
            return (math.isqrt(count) * side,) * 2
    return (PAPER_SIDE[model.encoder],) * 2


class Identified(NamedTuple):
    """A file of weights, and what it is of.

    Attributes:
        config: of its model.
        tensors: by the reference's names.
    """

    config: ConfigDict
    tensors: Mapping[str, np.ndarray]


def read_model(path: AnyPath, config: ConfigDict | None = None, *, encoder_only: bool = False) -> Identified:
    """Read a file of weights, in the reference's names or Hugging Face's, and find out of which model it is.

    Args:
        path: the file.
        config: the model, if the user names it; else what the file's metadata say, else what its shapes tell.
        encoder_only: whether nothing but the encoder matters.

    Raises:
        UserError: if the file is damaged, would run code, or is of none of this program's architectures.
    """
    tensors, metadata = read_weights(path)
    tensors = from_huggingface(tensors)
    if config is None and "config" in metadata:
        try:
            config = from_json(metadata["config"])
        except ValueError as error:
            raise UserError(f"{path} names a model that this program does not know ({error}); {NAME_IT}") from None
    return Identified(config or recognize(tensors, str(path), encoder_only=encoder_only), tensors)
