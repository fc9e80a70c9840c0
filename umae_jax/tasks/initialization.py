"""The first parameters of a classifier: those of a pre-trained encoder."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.errors import listing, require
from umae_jax.features import PretrainedParams
from umae_jax.models.positions_table import fixed_positions, resize_positions
from umae_jax.training.task import Params

_TABLE = ("positions", "table")


def adapt_pretrained(config: ConfigDict, abstract: Params, pretrained: ConfigDict, encoder: nnx.State) -> Params:
    """Return the classifier's parameters {"encoder": ...} from a pre-trained encoder, on the host.

    Position tables are resized if the image size differs from that of pre-training.

    Args:
        config: of the classifier; `config.init` names the encoder in the error message.
        abstract: the classifier's encoder, in shapes; parameters that it lacks, such as a final norm, are dropped.
        pretrained: configuration of the pre-trained model.
        encoder: parameters of its encoder.

    Raises:
        UserError: naming the sizes that differ.
    """
    keys = ["encoder", "channels", "patch", "widths", "depths", "heads", "mlp_ratios"]
    keys += ["position_width"] if "position_width" in config.model else []
    pairs = [(f"model.{key}", pretrained.model.get(key), config.model[key]) for key in keys]
    different = [f"{key} is {theirs}, not {ours}" for key, theirs, ours in pairs if theirs != ours]
    require(
        not different,
        f"init: {config.init} holds an encoder of other sizes ({'; '.join(different)}); "
        "choose a configuration of its sizes, or set these keys",
    )
    variables, shapes = dict(nnx.to_flat_state(encoder)), dict(nnx.to_flat_state(abstract))
    if _TABLE in shapes:
        old, new = (_grid(config, image_size) for image_size in (pretrained.image_size, config.image_size))
        leading = shapes[_TABLE].shape[1] - new[0] * new[1]  # 1 with a class token
        fixed = fixed_positions(config.model.widths[0], old, leading)
        learned = jnp.asarray(variables[_TABLE][...] if _TABLE in variables else fixed)
        variables[_TABLE] = nnx.Param(np.asarray(resize_positions(learned, old, new, leading=leading)))
    return nnx.State({"encoder": nnx.from_flat_state([(path, variables[path]) for path in shapes])})


def describe_loaded(
    config: ConfigDict, abstract: Params, pretrained: PretrainedParams, loaded: Params
) -> Iterator[str]:
    """Yield lines about the parameters that a classifier starts from.

    Args:
        config: of the classifier.
        abstract: all its parameters, in shapes.
        pretrained: the encoder.
        loaded: from `adapt_pretrained`.
    """
    ours, theirs = dict(nnx.to_flat_state(loaded)), dict(nnx.to_flat_state(nnx.State({"encoder": pretrained.params})))
    step = "" if pretrained.step is None else f", step {pretrained.step:,}"
    new = modules_of(path for path, _ in nnx.to_flat_state(abstract) if path not in ours)
    dropped = modules_of(path for path in theirs if path not in ours)
    yield (
        f"init: loaded {len(ours):,} tensors of the encoder from {pretrained.path}{step} "
        f"({pretrained.config.model.method}); new: {listing(new) or 'nothing'}"
        + (f"; not used: {listing(dropped)}" if dropped else "")
    )
    adapted = []
    if ("encoder", *_TABLE) in ours:
        old, new_grid = (_grid(config, image_size) for image_size in (pretrained.config.image_size, config.image_size))
        if old != new_grid:
            adapted.append(f"positions resized from {old[0]} x {old[1]} to {new_grid[0]} x {new_grid[1]} tokens")
    for key in ("window", "sr_ratios"):
        before, after = pretrained.config.model.get(key), config.model.get(key)
        if before != after:
            adapted.append(f"model.{key} changed from {before} to {after}")
    for key in ("mean", "std"):
        if pretrained.config.data[key] != config.data[key]:
            adapted.append(f"data.{key} differs from that of pre-training")
    if pretrained.config.image_size != config.image_size:
        sizes = ("{} x {}".format(*size) for size in (pretrained.config.image_size, config.image_size))
        adapted.append("images of {} pixels before, {} now".format(*sizes))
    if adapted:
        yield f"init: {'; '.join(adapted)}"


def modules_of(paths: Iterable[tuple[Any, ...]]) -> list[str]:
    """Return the modules of some parameters, such as "head" and "encoder.norm", without duplicates."""
    return list(dict.fromkeys(".".join(map(str, path[:-1])) for path in paths))


def _grid(config: ConfigDict, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of tokens at the encoder's input."""
    return image_size[0] // config.model.patch, image_size[1] // config.model.patch
