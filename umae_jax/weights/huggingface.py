"""Parameter names of a ViT in transformers: a table from the reference's names."""

from collections.abc import Iterator, Mapping

import numpy as np

from umae_jax.files import AnyPath
from umae_jax.weights.stored_run import FOLDER

# The reference's name -> the name in transformers. {n} counts blocks; {qkv} is one of three parameters, which the
# reference concatenates along the first axis.
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.{qkv}",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    **{f"blocks.{{n}}.{ours}": f"encoder.layer.{{n}}.{theirs}" for ours, theirs in _BLOCK.items()},
    "norm": "layernorm",
}
_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    **{f"decoder_blocks.{{n}}.{ours}": f"decoder.decoder_layers.{{n}}.{theirs}" for ours, theirs in _BLOCK.items()},
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
WEIGHTS_FILE = "model.safetensors"  # the only name that from_pretrained looks for
LAYOUTS = {"vit_mae": {ours: f"vit.{theirs}" for ours, theirs in _ENCODER.items()} | _DECODER, "vit": _ENCODER}
_DECODER_LAYERS_5 = "decoder.decoder_encoder.layer."  # what transformers 5 calls decoder.decoder_layers.
_PARAMETERS = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")  # modules have a weight and a bias instead


def _names(layout: str, max_blocks: int) -> Iterator[tuple[str, list[str]]]:
    """Expand the table for up to `max_blocks` blocks: the reference's name and the names in transformers."""
    for ours, theirs in LAYOUTS[layout].items():
        parts = ("query", "key", "value") if "{qkv}" in theirs else ("",)
        for n in range(max_blocks) if "{n}" in ours else (0,):
            for leaf in ("",) if ours in _PARAMETERS else (".weight", ".bias"):
                yield ours.format(n=n) + leaf, [theirs.format(n=n, qkv=part) + leaf for part in parts]


def to_huggingface(layout: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert the reference's state dict to a layout (a key of LAYOUTS); drop tensors that the layout lacks."""
    return {
        name: part
        for ours, theirs in _names(layout, len(tensors))
        if ours in tensors
        for name, part in zip(theirs, np.split(tensors[ours], len(theirs)), strict=True)
    }


def from_huggingface(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert a state dict of transformers to the reference's; return any other state dict as it is."""
    layout = next((layout for layout in LAYOUTS if LAYOUTS[layout]["cls_token"] in tensors), None)
    if layout is None:
        return dict(tensors)
    remaining = {name.replace(_DECODER_LAYERS_5, "decoder.decoder_layers."): array for name, array in tensors.items()}
    converted = {}
    for ours, theirs in _names(layout, len(tensors)):
        if all(name in remaining for name in theirs):
            converted[ours] = np.concatenate([remaining.pop(name) for name in theirs])
    return converted | remaining


def resolve_weights(path: AnyPath) -> AnyPath:
    """Return the weight file in a folder that transformers saved; return any other path as it is."""
    file = path / WEIGHTS_FILE
    return file if file.is_file() and not (path / FOLDER).exists() else path
