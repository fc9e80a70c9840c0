"""Parameter names and layouts of mmdet's HTC, Cascade and Mask R-CNN (3.x): FPN, RPN and RoI heads.

A detector's weight file has these names. Its encoder has the reference's names (`weights.names`) after "backbone.".
What the reference lacks, norms of the maps and HTC++'s global block, has our own names after "pyramid.".
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.detection.box_head import SIDE
from umae_jax.errors import UserError, listing
from umae_jax.weights.names import to_reference

# Our module -> mmdet's module. A number stays where it is.
_MODULES = (
    (r"fpn\.lateral\.(\d+)", r"neck.lateral_convs.\1.conv"),
    (r"fpn\.output\.(\d+)", r"neck.fpn_convs.\1.conv"),
    (r"rpn\.conv", r"rpn_head.rpn_conv"),
    (r"rpn\.objectness", r"rpn_head.rpn_cls"),
    (r"rpn\.deltas", r"rpn_head.rpn_reg"),
    (r"roi_heads\.box_heads\.(\d+)\.convs\.(\d+)", r"roi_head.bbox_head.\1.shared_convs.\2.conv"),
    (r"roi_heads\.box_heads\.(\d+)\.norms\.(\d+)", r"roi_head.bbox_head.\1.shared_convs.\2.bn"),
    (r"roi_heads\.box_heads\.(\d+)\.linear\.(\d+)", r"roi_head.bbox_head.\1.shared_fcs.\2"),
    (r"roi_heads\.box_heads\.(\d+)\.classify", r"roi_head.bbox_head.\1.fc_cls"),
    (r"roi_heads\.box_heads\.(\d+)\.refine", r"roi_head.bbox_head.\1.fc_reg"),
    (r"roi_heads\.mask_heads\.(\d+)\.convs\.(\d+)", r"roi_head.mask_head.\1.convs.\2.conv"),
    (r"roi_heads\.mask_heads\.(\d+)\.previous", r"roi_head.mask_head.\1.conv_res.conv"),
    (r"roi_heads\.mask_heads\.(\d+)\.upsample", r"roi_head.mask_head.\1.upsample"),
    (r"roi_heads\.mask_heads\.(\d+)\.logits", r"roi_head.mask_head.\1.conv_logits"),
    (r"roi_heads\.semantic_head\.lateral\.(\d+)", r"roi_head.semantic_head.lateral_convs.\1.conv"),
    (r"roi_heads\.semantic_head\.convs\.(\d+)", r"roi_head.semantic_head.convs.\1.conv"),
    (r"roi_heads\.semantic_head\.embedding", r"roi_head.semantic_head.conv_embedding.conv"),
    (r"roi_heads\.semantic_head\.logits", r"roi_head.semantic_head.conv_logits"),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_FLATTENED = re.compile(r"roi_head\.bbox_head\.\d+\.shared_fcs\.0\.weight")  # its inputs are channels x 7 x 7
_UPSAMPLE = ".upsample.weight"


class _Entry(NamedTuple):
    """mmdet's name of a parameter, and the conversions of its array."""

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _entry(path: str) -> _Entry:
    """Return the entry of one of our parameters, such as "fpn.lateral.0.kernel"; a KeyError if there is none."""
    if path.startswith("backbone."):
        return _Entry(path.replace("backbone", "pyramid", 1), lambda array: array, lambda array: array)
    module, _, leaf = path.rpartition(".")
    if leaf == "upsample_bias":
        module, leaf = f"{module}.upsample", "bias"
    for ours, theirs in _MODULES:
        if match := re.fullmatch(ours, module):
            name = f"{match.expand(theirs)}.{_LEAVES[leaf]}"
            return _Entry(name, *_layout(name, leaf))
    raise KeyError(path)


def _layout(name: str, leaf: str) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """Return the conversions of an array to our layout and to mmdet's."""
    if leaf != "kernel":
        return (lambda array: array), (lambda array: array)
    if _FLATTENED.fullmatch(name):
        return (
            lambda weight: weight.reshape(len(weight), -1, SIDE, SIDE).transpose(2, 3, 1, 0).reshape(-1, len(weight)),
            lambda kernel: (
                kernel.reshape(SIDE, SIDE, -1, kernel.shape[1]).transpose(3, 2, 0, 1).reshape(kernel.shape[::-1])
            ),
        )
    if name.endswith(_UPSAMPLE):  # [in, out, 2, 2] there, [in, 2 * 2 * out] here
        return (
            lambda weight: weight.transpose(0, 2, 3, 1).reshape(len(weight), -1),
            lambda kernel: kernel.reshape(len(kernel), 2, 2, -1).transpose(0, 3, 1, 2),
        )
    return (
        lambda weight: weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0),
        lambda kernel: kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1),
    )


def _number_stages(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Number the heads of a detector of one stage, which have no number in mmdet."""
    pattern = re.compile(r"(roi_head\.(?:bbox|mask)_head\.)(?!\d+\.)")
    return {pattern.sub(r"\g<1>0.", name): array for name, array in tensors.items()}


def to_mmdet(params: nnx.State) -> dict[str, np.ndarray]:
    """Convert the parameters and running statistics of a detector, without its backbone, to mmdet's state dict.

    Args:
        params: of a `Detector`, on the host; "backbone" may be missing.
    """
    tensors = {}
    for keys, variable in nnx.to_flat_state(params):
        if keys[0] != "backbone":
            entry = _entry(".".join(map(str, keys)))
            tensors[entry.name] = np.ascontiguousarray(entry.to_theirs(np.asarray(variable[...], np.float32)))
    if len(params["roi_heads"]["box_heads"]) == 1:
        tensors = {re.sub(r"(bbox_head|mask_head)\.0\.", r"\1.", name): array for name, array in tensors.items()}
    return tensors


def to_tensors(config: ConfigDict, params: nnx.State) -> dict[str, np.ndarray]:
    """Return the state dict of a whole detector, float32.

    Args:
        config: of the detector.
        params: of a `Detector`, on the host.
    """
    backbone = params["backbone"]
    tensors = {
        f"backbone.{name}": array
        for name, array in to_reference(config, nnx.State({"encoder": backbone["encoder"]})).items()
    }
    for keys, variable in nnx.to_flat_state(backbone):
        if keys[0] != "encoder":
            tensors[_entry(".".join(["backbone", *map(str, keys)])).name] = np.asarray(variable[...], np.float32)
    return tensors | to_mmdet(params)


class Fitting(NamedTuple):
    """The tensors of a state dict that fit a detector, and those that do not."""

    params: dict[Any, Any]  # flat, float32 on the host
    problems: list[str]  # of our other parameters: missing, or of another shape
    unexpected: list[str]  # tensors that the detector does not have


def fit_tensors(params: nnx.State, tensors: Mapping[str, np.ndarray]) -> Fitting:
    """Convert the tensors of a state dict, beside those of the encoder, that fit the parameters of a detector.

    Args:
        params: of a `Detector`, or their shapes; "backbone" may be missing.
        tensors: the state dict, from `to_tensors` or of mmdet; counters of batches are ignored.
    """
    tensors = _number_stages(tensors)
    unexpected = {key for key in tensors if not key.startswith("backbone.") and not key.endswith("num_batches_tracked")}
    converted, problems = {}, []
    for keys, variable in nnx.to_flat_state(params):
        if keys[:2] == ("backbone", "encoder"):
            continue
        entry = _entry(".".join(map(str, keys)))
        unexpected.discard(entry.name)
        if entry.name not in tensors:
            problems.append(f"{entry.name} is missing")
            continue
        array = np.asarray(tensors[entry.name], np.float32)
        expected = jax.eval_shape(entry.to_theirs, jax.ShapeDtypeStruct(variable.shape, np.float32)).shape
        if array.shape != expected:
            problems.append(f"{entry.name} is {list(array.shape)}, not {list(expected)}")
            continue
        converted[keys] = variable.replace(np.ascontiguousarray(entry.to_ours(array)))
    return Fitting(converted, problems, sorted(unexpected))


def from_mmdet(params: nnx.State, tensors: Mapping[str, np.ndarray], *, name: str) -> nnx.State:
    """Convert mmdet's state dict to the parameters of a detector without its backbone, float32 on the host.

    Args:
        params: of a `Detector`, or their shapes; "backbone" may be missing.
        tensors: the state dict; tensors of a backbone and counters of batches are ignored.
        name: the file, for error messages.

    Raises:
        UserError: listing every tensor that is missing, unexpected or of a wrong shape.
    """
    fitting = fit_tensors(nnx.State({key: part for key, part in params.items() if key != "backbone"}), tensors)
    problems = [*fitting.problems, *(f"{key} is unexpected" for key in fitting.unexpected)]
    if problems:
        raise UserError(f"{name} does not fit the configured detector: {listing(problems)}")
    return nnx.from_flat_state(fitting.params)


def is_detector(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether a state dict holds a detector with mmdet's names, perhaps after a prefix."""
    return _prefix(tensors) is not None


def remove_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of the detector in a state dict, without the prefix that a surrounding model adds."""
    prefix = _prefix(tensors) or ""
    return {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}


def _prefix(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Return the part of the names before that of the RPN; None without an RPN."""
    matches = (re.match(r"((?:.+\.)?)rpn_head\.", key) for key in tensors)
    return min((match[1] for match in matches if match), key=len, default=None)
