"""The reference's names and layouts (SPEC 13), as one table that is read in both directions."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.errors import UserError
from umae_jax.positions import sincos_table

Tensors = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How one array is laid out here and there; both directions."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _convolution(side: int) -> Layout:
    """A convolution [out, in, side, side] is patchify and a linear layer [side * side * in, out]."""
    return Layout(
        to_ours=lambda weight: weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]),
        to_theirs=lambda kernel: kernel.reshape(side, side, -1, kernel.shape[-1]).transpose(3, 2, 0, 1),
    )


SAME = Layout(lambda weight: weight, lambda array: array)
TRANSPOSED = Layout(np.transpose, np.transpose)  # linear [out, in]
POINTWISE, HALVING = _convolution(1), _convolution(2)

# What a module's parameters are called here and there.
LINEAR = (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME))
POINTWISE_CONVOLUTION = (("kernel", "weight", POINTWISE), ("bias", "bias", SAME))
HALVING_CONVOLUTION = (("kernel", "weight", HALVING), ("bias", "bias", SAME))
PATCH_CONVOLUTION = (("kernel", "weight", None), ("bias", "bias", SAME))  # its side is the model's
NORM = (("scale", "weight", SAME), ("bias", "bias", SAME))
PARAMETER = (("", "", SAME),)

_SWIN = "encoder.stages.{stage}.blocks.{block}."
_VIT = (
    ("norm1", "norm1", NORM),
    ("qkv", "attn.qkv", LINEAR),
    ("proj", "attn.proj", LINEAR),
    ("norm2", "norm2", NORM),
    ("mlp.fc1", "mlp.fc1", LINEAR),
    ("mlp.fc2", "mlp.fc2", LINEAR),
)


def _blocks(ours: str, theirs: str, rows: tuple[tuple[str, str, Any], ...]) -> tuple[tuple[str, str, Any], ...]:
    return tuple((ours + name, theirs + other, layout) for name, other, layout in rows)


# Here, there, layout. {stage} and {block} count from 0, {number} counts blocks through all stages. Blocks are numbered
# through all stages there, and the first block of a stage holds what leads to it.
ENCODERS = {
    "swin": (
        ("encoder.patch_embed", "patch_embed.proj", PATCH_CONVOLUTION),
        ("encoder.patch_norm", "patch_embed.norm", NORM),
        ("encoder.stages.{stage}.merge.norm", "blocks.{number}.downsample.norm", NORM),
        ("encoder.stages.{stage}.merge.proj", "blocks.{number}.downsample.proj", HALVING_CONVOLUTION),
        *_blocks("encoder.stages.{stage}.blocks.{block}.", "blocks.{number}.", _VIT),
        (_SWIN + "position.fc1", "blocks.{number}.attn.posmlp.0", POINTWISE_CONVOLUTION),
        (_SWIN + "position.fc2", "blocks.{number}.attn.posmlp.2", POINTWISE_CONVOLUTION),
        ("encoder.norm", "norm", NORM),
    ),
    "pvt": (
        ("encoder.positions.table", "pos_embed", PARAMETER),
        ("encoder.patch_embed", "patch_embed.proj", PATCH_CONVOLUTION),
        ("encoder.stages.{stage}.merge", "blocks.{number}.downsample.proj", HALVING_CONVOLUTION),
        *_blocks(
            "encoder.stages.{stage}.blocks.{block}.",
            "blocks.{number}.",
            (
                ("norm1", "norm1", NORM),
                ("attention.q", "attn.q", LINEAR),
                ("attention.kv", "attn.kv", LINEAR),
                ("attention.proj", "attn.proj", LINEAR),
                ("attention.reduce", "attn.sr", POINTWISE_CONVOLUTION),
                ("attention.norm", "attn.norm", NORM),
                ("norm2", "norm2", NORM),
                ("mlp.fc1", "mlp.fc1", LINEAR),
                ("mlp.fc2", "mlp.fc2", LINEAR),
            ),
        ),
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
_AUTOENCODER = (
    ("mask_token", "vis_mask_token", PARAMETER),
    ("decoder_embed", "decoder_embed", LINEAR),
    ("decoder_mask_token", "mask_token", PARAMETER),
    *_blocks("decoder_blocks.{decoder_block}.", "decoder_blocks.{decoder_block}.", _VIT),
    ("decoder_norm", "decoder_norm", NORM),
    ("decoder_prediction", "decoder_pred", LINEAR),
)
METHODS = {
    "um_mae": _AUTOENCODER,
    "mae": _AUTOENCODER,
    "simmim": (
        ("mask_token", "mask_token", PARAMETER),
        ("decoder_prediction", "decoder_pred", LINEAR),
    ),
    "classifier": (
        ("head_norm", "fc_norm", NORM),
        ("head", "head", LINEAR),
    ),
}


# What names begin with that are no encoder's: decoders, mask tokens and heads, those of other programs included.
BESIDE_ENCODERS = ("decoder", "mask_token", "vis_mask_token", "head", "fc_norm", "pooler.", "classifier.")


class Entry(NamedTuple):
    """One parameter: its path here, its name there, and its layouts."""

    ours: str
    theirs: str
    layout: Layout


def entries(config: ConfigDict) -> Iterator[Entry]:
    """The table written out for one model; some of what it names the model may not have."""
    model = config.model
    blocks = [
        {"stage": stage, "block": block, "number": sum(model.depths[:stage]) + block}
        for stage, depth in enumerate(model.depths)
        for block in range(depth)
    ]
    places = {
        "{block}": blocks,
        "{stage}": [place for place in blocks if place["block"] == 0],
        "{decoder_block}": [{"decoder_block": block} for block in range(model.get("decoder_depth", 0))],
    }
    for ours, theirs, leaves in ENCODERS[model.encoder] + METHODS[model.method]:
        field = next((field for field in places if field in ours), None)
        for place in [{}] if field is None else places[field]:
            for leaf, other, layout in leaves:
                yield Entry(
                    ".".join(filter(None, (ours.format(**place), leaf))),
                    ".".join(filter(None, (theirs.format(**place), other))),
                    _convolution(model.patch) if layout is None else layout,
                )


def _by_path(params: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, keys)): variable for keys, variable in nnx.to_flat_state(params)}


def _fixed_tables(config: ConfigDict) -> dict[str, np.ndarray]:
    """The reference's fixed position tables, which are no parameters here."""
    model = config.model
    leading = int(model.encoder == "vit")

    def table(width: int, side: int) -> np.ndarray:
        rows, columns = (size // side for size in config.image_size)
        flat = sincos_table(width, (rows, columns)).reshape(1, -1, width)
        return np.pad(flat, ((0, 0), (leading, 0), (0, 0)))

    tables = {}
    if model.encoder != "swin" and model.method != "classifier":
        tables["pos_embed"] = table(model.widths[0], model.patch)
    if model.method in ("um_mae", "mae"):
        unit = model.patch * 2 ** (len(model.depths) - 1) // model.decoder_factor
        tables["decoder_pos_embed"] = table(model.decoder_width, unit)
    return tables


def to_reference(config: ConfigDict, params: nnx.State) -> dict[str, np.ndarray]:
    """The state dict that the reference would load strictly: float32 arrays by its names, fixed tables included."""
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
    """The inverse: parameters of our model from the reference's state dict.

    Args:
        config: of the model.
        params: the model's parameters, or their shapes.
        tensors: the state dict; fixed tables may be missing.
        name: of the file, for the error message.
        only: where our paths must begin; the rest of the model is left out, and what a file holds beside an encoder.

    Raises:
        UserError: naming all that is missing, unexpected, of another shape or not what it should be.
    """
    ours = {path: variable for path, variable in _by_path(params).items() if path.startswith(only)}
    values: dict[str, np.ndarray] = {}
    missing, wrong, left = [], [], set(tensors)
    for entry in entries(config):
        if entry.ours not in ours:
            if not entry.ours.startswith(only):
                left.discard(entry.theirs)
            continue
        if entry.theirs not in tensors:
            missing.append(entry.theirs)
            continue
        left.discard(entry.theirs)
        shape = ours[entry.ours].shape
        expected = entry.layout.to_theirs(np.broadcast_to(np.float32(0), shape)).shape
        found = tensors[entry.theirs]
        if found.shape != expected:
            wrong.append(f"{entry.theirs} is {list(found.shape)}, not {list(expected)}")
            continue
        values[entry.ours] = np.ascontiguousarray(entry.layout.to_ours(np.asarray(found, np.float32)))
    for fixed, table in _fixed_tables(config).items():
        if fixed in left:
            left.discard(fixed)
            if tensors[fixed].shape != table.shape:
                wrong.append(f"{fixed} is {list(tensors[fixed].shape)}, not {list(table.shape)}")
            elif not np.allclose(tensors[fixed], table, atol=1e-3):
                wrong.append(f"{fixed} is not the fixed sin-cos table")
    wrong += [f"{key} is not finite" for key in tensors if key not in left and not np.isfinite(tensors[key]).all()]
    if only:
        left -= {name for name in left if name.startswith(BESIDE_ENCODERS)}
    elif missing and not left and not wrong and all(name.startswith(BESIDE_ENCODERS) for name in missing):
        raise UserError(
            f"{name} holds an encoder alone, which umae_jax.load_encoder and fine-tuning's init read as it is; a run "
            "needs a whole model"
        )
    problems = {"missing": missing, "unexpected": sorted(left), "wrong": wrong}
    told = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names)
    if told:
        model = f"a {config.model.encoder} for {config.model.method} as the configuration has it"
        raise UserError(f"{name} does not fit {model}: {told}; name the model that it is of with --config FILE")
    filled = nnx.to_flat_state(params)
    return nnx.from_flat_state(
        [
            (keys, variable.replace(values[".".join(map(str, keys))]))
            for keys, variable in filled
            if ".".join(map(str, keys)) in values
        ]
    )
