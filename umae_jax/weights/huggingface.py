"""Hugging Face's names for a ViT, as one table over the reference's, and the files that transformers wants beside."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import umae_jax
from umae_jax.files import AnyPath
from umae_jax.models.autoencoder import DECODER_MLP_RATIO
from umae_jax.training.checkpoint import FOLDER

# The reference's name, and theirs; of the fused qkv three names, along the first axis. {n} counts blocks.
_BLOCK = (
    ("norm1", ("layernorm_before",)),
    ("attn.qkv", tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))),
    ("attn.proj", ("attention.output.dense",)),
    ("norm2", ("layernorm_after",)),
    ("mlp.fc1", ("intermediate.dense",)),
    ("mlp.fc2", ("output.dense",)),
)
_ENCODER = (
    ("cls_token", ("embeddings.cls_token",)),
    ("pos_embed", ("embeddings.position_embeddings",)),
    ("patch_embed.proj", ("embeddings.patch_embeddings.projection",)),
    *((f"blocks.{{n}}.{ours}", tuple(f"encoder.layer.{{n}}.{name}" for name in theirs)) for ours, theirs in _BLOCK),
    ("norm", ("layernorm",)),
)
_DECODER = (
    ("mask_token", ("decoder.mask_token",)),
    ("decoder_pos_embed", ("decoder.decoder_pos_embed",)),
    ("decoder_embed", ("decoder.decoder_embed",)),
    *(
        (f"decoder_blocks.{{n}}.{ours}", tuple(f"decoder.decoder_layers.{{n}}.{name}" for name in theirs))
        for ours, theirs in _BLOCK
    ),
    ("decoder_norm", ("decoder.decoder_norm",)),
    ("decoder_pred", ("decoder.decoder_pred",)),
)
WRITER = "umae_jax"  # the key of a config.json that is ours to write anew
TRANSFORMERS_FILE = "model.safetensors"
LAYOUTS = {
    "vit_mae": (*((ours, tuple(f"vit.{name}" for name in theirs)) for ours, theirs in _ENCODER), *_DECODER),
    "vit": _ENCODER,
}
_SPELLINGS = {"decoder.decoder_encoder.layer.": "decoder.decoder_layers."}  # of transformers 5, and the one above
_PARAMETERS = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")  # the others have a weight and a bias


def _names(layout: str, blocks: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The table written out for at most so many blocks: the reference's name, and theirs."""
    for ours, theirs in LAYOUTS[layout]:
        for n in range(blocks) if "{n}" in ours else (0,):
            for leaf in ("",) if ours in _PARAMETERS else (".weight", ".bias"):
                yield ours.format(n=n) + leaf, tuple(name.format(n=n) + leaf for name in theirs)


def to_huggingface(layout: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From the reference's state dict to that of a key of LAYOUTS; what has no place there is left out."""
    return {
        name: part
        for ours, theirs in _names(layout, len(tensors))
        if ours in tensors
        for name, part in zip(theirs, np.split(tensors[ours], len(theirs)), strict=True)
    }


def from_huggingface(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From Hugging Face's state dict to the reference's; any other comes back as it is."""
    layout = next((layout for layout in LAYOUTS if LAYOUTS[layout][0][1][0] in tensors), None)
    if layout is None:
        return dict(tensors)
    left, found = {}, {}
    for name, array in tensors.items():
        for spelling, usual in _SPELLINGS.items():
            name = name.replace(spelling, usual)
        left[name] = array
    for ours, theirs in _names(layout, len(tensors)):
        if all(name in left for name in theirs):
            found[ours] = np.concatenate([left.pop(name) for name in theirs])
    return found | left


def weights_in(path: AnyPath) -> AnyPath:
    """The file of weights in a folder that transformers saved; any other path comes back as it is."""
    inside = path / TRANSFORMERS_FILE
    return inside if inside.is_file() and not (path / FOLDER).exists() else path


def model_config(layout: str, config: ConfigDict) -> dict[str, Any]:
    """The config.json of a key of LAYOUTS."""
    model = config.model
    (width,), (depth,), (heads,), (mlp_ratio,) = model.widths, model.depths, model.heads, model.mlp_ratios
    height, width_in_pixels = config.image_size
    described = {
        "model_type": layout,
        "architectures": [{"vit_mae": "ViTMAEForPreTraining", "vit": "ViTModel"}[layout]],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp_ratio * width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": height if height == width_in_pixels else [height, width_in_pixels],
        "patch_size": model.patch,
        "num_channels": model.channels,
        WRITER: umae_jax.__version__,
    }
    if layout == "vit_mae":
        described |= {
            "decoder_hidden_size": model.decoder_width,
            "decoder_num_hidden_layers": model.decoder_depth,
            "decoder_num_attention_heads": model.decoder_heads,
            "decoder_intermediate_size": DECODER_MLP_RATIO * model.decoder_width,
            "mask_ratio": 0.75,
            "norm_pix_loss": model.norm_pix_loss,
        }
    return described


def preprocessor_config(config: ConfigDict) -> dict[str, Any]:
    """The preprocessor_config.json: resize, scale to [0, 1], normalise."""
    height, width = config.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.mean),
        "image_std": list(config.data.std),
    }
