"""Parameter names and layouts of the PyTorch reference (SPEC 13): one table for both directions."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.errors import UserError
from umae_jax.positions import sincos_table


class Layout(NamedTuple):
    """Conversions of one array between our layout and the reference's."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _convolution(side: int) -> Layout:
    """Convert between a convolution [out, in, side, side] and our linear layer on patches [side * side * in, out]."""
    return Layout(
        to_ours=lambda weight: weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]),
        to_theirs=lambda kernel: kernel.reshape(side, side, -1, kernel.shape[-1]).transpose(3, 2, 0, 1),
    )


SAME = Layout(lambda weight: weight, lambda array: array)
TRANSPOSED = Layout(np.transpose, np.transpose)  # linear [out, in]

# Our name -> the reference's name. Single parameters, then modules outside blocks, then modules of a block.
PARAMETERS = {
    "encoder.class_token": "cls_token",
    "encoder.positions.table": "pos_embed",
    "mask_token": "vis_mask_token",  # of the autoencoder; that of SimMIM is called mask_token
    "decoder_mask_token": "mask_token",
}
MODULES = {
    "encoder.patch_embed": "patch_embed.proj",
    "encoder.patch_norm": "patch_embed.norm",
    "encoder.norm": "norm",
    "decoder_embed": "decoder_embed",
    "decoder_norm": "decoder_norm",
    "decoder_prediction": "decoder_pred",
    "head_norm": "fc_norm",
    "head": "head",
}
BLOCK_MODULES = {
    "merge": "downsample.proj",  # PVT
    "merge.norm": "downsample.norm",  # Swin
    "merge.proj": "downsample.proj",
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "position.fc1": "attn.posmlp.0",
    "position.fc2": "attn.posmlp.2",
    "attention.q": "attn.q",
    "attention.kv": "attn.kv",
    "attention.proj": "attn.proj",
    "attention.reduce": "attn.sr",
    "attention.norm": "attn.norm",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Kernel sides of the reference's convolutions, which are linear layers here; `model.patch` is that of the first one.
CONVOLUTIONS = {"downsample.proj": 2, "attn.posmlp.0": 1, "attn.posmlp.2": 1, "attn.sr": 1}

# Prefixes of names outside the encoder: decoders, mask tokens and heads, also those of other programs.
NOT_ENCODER = ("decoder", "mask_token", "vis_mask_token", "head", "fc_norm", "pooler.", "classifier.")


class Entry(NamedTuple):
    """The reference's counterpart of one parameter."""

    name: str  # in the reference's state dict
    layout: Layout


def reference_entry(config: ConfigDict, path: str) -> Entry:
    """Return the reference's name and layout of a parameter of our model.

    Args:
        config: the model's configuration.
        path: dotted path of the parameter.

    Raises:
        KeyError: if the table has no such parameter.
    """
    model = config.model
    if path in PARAMETERS:
        return Entry(path if model.method == "simmim" and path == "mask_token" else PARAMETERS[path], SAME)

    # The reference numbers blocks through all stages; its first block of a stage includes the merge before that stage.
    def numbered(stage_and_block: re.Match) -> str:
        stage, block = stage_and_block.groups(default="0")
        return f"blocks.{sum(model.depths[: int(stage)]) + int(block)}"

    module, _, leaf = path.rpartition(".")
    module = re.sub(r"^encoder\.stages\.(\d+)(?:\.blocks\.(\d+))?", numbered, module)
    if match := re.match(r"(?:encoder\.)?((?:decoder_)?blocks\.\d+\.)(.+)", module):
        block, theirs = match[1], BLOCK_MODULES[match[2]]
    else:
        block, theirs = "", MODULES[module]
    layout = SAME
    if leaf == "kernel":
        side = model.patch if module == "encoder.patch_embed" else CONVOLUTIONS.get(theirs)
        layout = _convolution(side) if side else TRANSPOSED
    return Entry(f"{block}{theirs}.{LEAVES[leaf]}", layout)


def fixed_tables(config: ConfigDict) -> dict[str, np.ndarray]:
    """Compute the reference's fixed position tables, which are not parameters of our models."""
    model = config.model
    class_tokens = int(len(model.depths) == 1)  # only a ViT has one

    def table(width: int, side: int) -> np.ndarray:
        rows, columns = (size // side for size in config.image_size)
        flat = sincos_table(width, (rows, columns)).reshape(1, -1, width)
        return np.pad(flat, ((0, 0), (class_tokens, 0), (0, 0)))

    tables = {}
    if "window" not in model and "drop_path" not in model:  # learned after pre-training
        tables["pos_embed"] = table(model.widths[0], model.patch)
    if "decoder_width" in model:
        unit = model.patch * 2 ** (len(model.depths) - 1) // model.decoder_factor
        tables["decoder_pos_embed"] = table(model.decoder_width, unit)
    return tables


def _rounding(values: np.ndarray) -> float:
    """Return the spacing at 1 of the dtype that the values are rounded to, even if they are float32 again; else 0."""
    with np.errstate(over="ignore"):
        rounded = [dtype for dtype in (jnp.bfloat16, jnp.float16) if (values.astype(dtype) == values).all()]
    return max((float(jnp.finfo(dtype).eps) for dtype in rounded), default=0.0)


def to_reference(config: ConfigDict, params: nnx.State) -> dict[str, np.ndarray]:
    """Convert a model's parameters to the float32 state dict that the reference loads strictly.

    It includes the fixed position tables.
    """
    tensors = {}
    for keys, variable in nnx.to_flat_state(params):
        name, layout = reference_entry(config, ".".join(map(str, keys)))
        tensors[name] = np.ascontiguousarray(layout.to_theirs(np.asarray(variable[...], np.float32)))
    return tensors | fixed_tables(config)


def from_reference(
    config: ConfigDict, params: nnx.State, tensors: Mapping[str, np.ndarray], *, name: str, only: str = ""
) -> nnx.State:
    """Convert the reference's state dict to a model's parameters, float32 on the host.

    Args:
        config: the model's configuration.
        params: the model's parameters, or their shapes.
        tensors: the state dict; fixed position tables may be missing.
        name: the file, for error messages.
        only: convert only parameters whose path starts with this ("encoder."), and ignore decoders and heads.

    Raises:
        UserError: listing every tensor that is missing, unexpected, of a wrong shape or wrong in value.
    """
    converted = {}
    missing, wrong, unexpected = [], [], set(tensors)
    for keys, variable in nnx.to_flat_state(params):
        path = ".".join(map(str, keys))
        if not path.startswith(only):
            continue
        theirs, layout = reference_entry(config, path)
        if theirs not in tensors:
            missing.append(theirs)
            continue
        unexpected.discard(theirs)
        tensor = tensors[theirs]
        expected = layout.to_theirs(np.broadcast_to(np.float32(0), variable.shape)).shape
        if tensor.shape == expected:
            value = np.ascontiguousarray(layout.to_ours(np.asarray(tensor, np.float32)))
            converted[keys] = variable.replace(value)
        else:
            wrong.append(f"{theirs} is {list(tensor.shape)}, not {list(expected)}")
    for fixed, table in fixed_tables(config).items():
        if fixed in unexpected and not (only and fixed.startswith(NOT_ENCODER)):
            unexpected.discard(fixed)
            if tensors[fixed].shape != table.shape:
                wrong.append(f"{fixed} is {list(tensors[fixed].shape)}, not {list(table.shape)}")
            elif not np.allclose(tensors[fixed], table, atol=max(1e-3, _rounding(tensors[fixed]))):
                wrong.append(f"{fixed} is not the fixed sin-cos table")
    known = sorted(tensors.keys() - unexpected)
    wrong += [f"{key} is not finite" for key in known if not np.isfinite(tensors[key]).all()]
    if only:
        unexpected = {key for key in unexpected if not key.startswith(NOT_ENCODER)}
    elif missing and not unexpected and not wrong and all(key.startswith(NOT_ENCODER) for key in missing):
        raise UserError(
            f"{name} holds only an encoder, and a run needs a whole model; use the file with umae_jax.load_encoder, or "
            "as init of fine-tuning"
        )
    groups = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong": wrong}
    problems = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in groups.items() if names)
    if problems:
        model = f"the configured {config.model.encoder} for {config.model.method}"
        raise UserError(f"{name} does not fit {model}: {problems}; give its own model with --config FILE")
    return nnx.from_flat_state(converted)
