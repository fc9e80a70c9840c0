"""Parameter names and layouts of the PyTorch reference (SPEC 13): one table for both directions."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.errors import UserError
from umae_jax.positions import sincos_table

Tensors = Mapping[str, np.ndarray]


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

# A module's parameters: our name, the reference's name, layout.
LINEAR = (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME))
POINTWISE_CONVOLUTION = (("kernel", "weight", _convolution(1)), ("bias", "bias", SAME))
HALVING_CONVOLUTION = (("kernel", "weight", _convolution(2)), ("bias", "bias", SAME))
PATCH_CONVOLUTION = (("kernel", "weight", None), ("bias", "bias", SAME))  # the patch sets the layout
NORM = (("scale", "weight", SAME), ("bias", "bias", SAME))
PARAMETER = (("", "", SAME),)

Rows = tuple[tuple[str, str, Any], ...]

# Modules of a block.
_VIT: Rows = (
    ("norm1", "norm1", NORM),
    ("qkv", "attn.qkv", LINEAR),
    ("proj", "attn.proj", LINEAR),
    ("norm2", "norm2", NORM),
    ("mlp.fc1", "mlp.fc1", LINEAR),
    ("mlp.fc2", "mlp.fc2", LINEAR),
)
_SWIN: Rows = (
    *_VIT,
    ("position.fc1", "attn.posmlp.0", POINTWISE_CONVOLUTION),
    ("position.fc2", "attn.posmlp.2", POINTWISE_CONVOLUTION),
)
_PVT: Rows = (
    ("norm1", "norm1", NORM),
    ("attention.q", "attn.q", LINEAR),
    ("attention.kv", "attn.kv", LINEAR),
    ("attention.proj", "attn.proj", LINEAR),
    ("attention.reduce", "attn.sr", POINTWISE_CONVOLUTION),
    ("attention.norm", "attn.norm", NORM),
    *_VIT[3:],
)


def _blocks(ours: str, theirs: str, rows: Rows) -> Rows:
    """Prefix the modules of a block."""
    return tuple((ours + name, theirs + other, layout) for name, other, layout in rows)


# Our module, the reference's module, parameters. {stage} and {block} count from 0. The reference numbers blocks through
# all stages, {number}, and its first block of a stage includes the downsampling before that stage.
ENCODERS: dict[str, Rows] = {
    "swin": (
        ("encoder.patch_embed", "patch_embed.proj", PATCH_CONVOLUTION),
        ("encoder.patch_norm", "patch_embed.norm", NORM),
        ("encoder.stages.{stage}.merge.norm", "blocks.{number}.downsample.norm", NORM),
        ("encoder.stages.{stage}.merge.proj", "blocks.{number}.downsample.proj", HALVING_CONVOLUTION),
        *_blocks("encoder.stages.{stage}.blocks.{block}.", "blocks.{number}.", _SWIN),
        ("encoder.norm", "norm", NORM),
    ),
    "pvt": (
        ("encoder.positions.table", "pos_embed", PARAMETER),
        ("encoder.patch_embed", "patch_embed.proj", PATCH_CONVOLUTION),
        ("encoder.stages.{stage}.merge", "blocks.{number}.downsample.proj", HALVING_CONVOLUTION),
        *_blocks("encoder.stages.{stage}.blocks.{block}.", "blocks.{number}.", _PVT),
        ("encoder.norm", "norm", NORM),
    ),
    "vit": (
        ("encoder.class_token", "cls_token", PARAMETER),
        ("encoder.positions.table", "pos_embed", PARAMETER),
        ("encoder.patch_embed", "patch_embed.proj", PATCH_CONVOLUTION),
        *_blocks("encoder.blocks.{block}.", "blocks.{block}.", _VIT),
        ("encoder.norm", "norm", NORM),
    ),
}
_AUTOENCODER: Rows = (
    ("mask_token", "vis_mask_token", PARAMETER),
    ("decoder_embed", "decoder_embed", LINEAR),
    ("decoder_mask_token", "mask_token", PARAMETER),
    *_blocks("decoder_blocks.{decoder_block}.", "decoder_blocks.{decoder_block}.", _VIT),
    ("decoder_norm", "decoder_norm", NORM),
    ("decoder_prediction", "decoder_pred", LINEAR),
)
METHODS: dict[str, Rows] = {
    "um_mae": _AUTOENCODER,
    "mae": _AUTOENCODER,
    "simmim": (("mask_token", "mask_token", PARAMETER), ("decoder_prediction", "decoder_pred", LINEAR)),
    "classifier": (("head_norm", "fc_norm", NORM), ("head", "head", LINEAR)),
}

# Prefixes of names outside the encoder: decoders, mask tokens and heads, also those of other programs.
NOT_ENCODER = ("decoder", "mask_token", "vis_mask_token", "head", "fc_norm", "pooler.", "classifier.")


class Entry(NamedTuple):
    """One parameter of the table."""

    ours: str  # dotted path in our model
    theirs: str  # name in the reference's state dict
    layout: Layout


def entries(config: ConfigDict) -> Iterator[Entry]:
    """Expand the table for one model; the model may lack some of the entries."""
    model = config.model
    blocks = [
        {"stage": stage, "block": block, "number": sum(model.depths[:stage]) + block}
        for stage, depth in enumerate(model.depths)
        for block in range(depth)
    ]
    indices: dict[str, list[dict[str, int]]] = {
        "{block}": blocks,
        "{stage}": [index for index in blocks if index["block"] == 0],
        "{decoder_block}": [{"decoder_block": block} for block in range(model.get("decoder_depth", 0))],
        "": [{}],
    }
    for our_module, their_module, leaves in ENCODERS[model.encoder] + METHODS[model.method]:
        for index in next(numbers for field, numbers in indices.items() if field in our_module):
            for our_leaf, their_leaf, layout in leaves:
                ours = f"{our_module}.{our_leaf}".format(**index).rstrip(".")
                theirs = f"{their_module}.{their_leaf}".format(**index).rstrip(".")
                yield Entry(ours, theirs, layout or _convolution(model.patch))


def _by_path(params: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, keys)): variable for keys, variable in nnx.to_flat_state(params)}


def _fixed_tables(config: ConfigDict) -> dict[str, np.ndarray]:
    """Compute the reference's fixed position tables, which are not parameters of our models."""
    model = config.model
    class_tokens = int(model.encoder == "vit")

    def table(width: int, side: int) -> np.ndarray:
        rows, columns = (size // side for size in config.image_size)
        flat = sincos_table(width, (rows, columns)).reshape(1, -1, width)
        return np.pad(flat, ((0, 0), (class_tokens, 0), (0, 0)))

    tables = {}
    if model.encoder != "swin" and model.method != "classifier":
        tables["pos_embed"] = table(model.widths[0], model.patch)
    if model.method in ("um_mae", "mae"):
        unit = model.patch * 2 ** (len(model.depths) - 1) // model.decoder_factor
        tables["decoder_pos_embed"] = table(model.decoder_width, unit)
    return tables


def to_reference(config: ConfigDict, params: nnx.State) -> dict[str, np.ndarray]:
    """Convert a model's parameters to the float32 state dict that the reference loads strictly.

    It includes the fixed position tables.
    """
    ours = {path: np.asarray(variable[...], np.float32) for path, variable in _by_path(params).items()}
    tensors = {
        entry.theirs: np.ascontiguousarray(entry.layout.to_theirs(ours.pop(entry.ours)))
        for entry in entries(config)
        if entry.ours in ours
    }
    if ours:
        raise ValueError(f"no entry of the table for {sorted(ours)}")
    return tensors | _fixed_tables(config)


def from_reference(config: ConfigDict, params: nnx.State, tensors: Tensors, *, name: str, only: str = "") -> nnx.State:
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
    ours = {path: variable for path, variable in _by_path(params).items() if path.startswith(only)}
    values: dict[str, np.ndarray] = {}
    missing, wrong, unexpected = [], [], set(tensors)
    for entry in entries(config):
        if entry.ours not in ours:
            continue
        if entry.theirs not in tensors:
            missing.append(entry.theirs)
            continue
        unexpected.discard(entry.theirs)
        tensor, shape = tensors[entry.theirs], ours[entry.ours].shape
        expected = entry.layout.to_theirs(np.broadcast_to(np.float32(0), shape)).shape
        if tensor.shape == expected:
            values[entry.ours] = np.ascontiguousarray(entry.layout.to_ours(np.asarray(tensor, np.float32)))
        else:
            wrong.append(f"{entry.theirs} is {list(tensor.shape)}, not {list(expected)}")
    for fixed, table in _fixed_tables(config).items():
        if fixed in unexpected:
            unexpected.discard(fixed)
            if tensors[fixed].shape != table.shape:
                wrong.append(f"{fixed} is {list(tensors[fixed].shape)}, not {list(table.shape)}")
            elif not np.allclose(tensors[fixed], table, atol=1e-3):
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
    groups = {"missing": missing, "unexpected": sorted(unexpected), "wrong": wrong}
    problems = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in groups.items() if names)
    if problems:
        model = f"the configured {config.model.encoder} for {config.model.method}"
        raise UserError(f"{name} does not fit {model}: {problems}; give its own model with --config FILE")
    converted = {}
    for keys, variable in nnx.to_flat_state(params):
        if (path := ".".join(map(str, keys))) in values:
            converted[keys] = variable.replace(values[path])
    return nnx.from_flat_state(converted)
