"""AdamW after SPEC 10, but for the learning rate, which the step applies (see `step.py`)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Params = Any  # a pytree of arrays


def _map_by_name(function: Callable[[str, jax.Array], Any], params: Params) -> Any:  # noqa: ANN401 - a pytree alike
    """A function of each parameter's dotted path, such as "encoder.stages.0.blocks.1.qkv.kernel", and its array."""

    def of_leaf(path: tuple[Any, ...], leaf: jax.Array) -> Any:  # noqa: ANN401
        return function(jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def decay_mask(params: Params) -> Any:  # noqa: ANN401 - a pytree alike
    """True where weight decay applies: on every parameter of more than one dimension but position embeddings."""
    return _map_by_name(lambda name, param: param.ndim > 1 and name != "encoder.positions.table", params)


def layer_number(name: str, depths: Sequence[int]) -> int:
    """The layer of a classifier's parameter, from 0 at the input to the number of blocks + 1 at the head (SPEC 10).

    The merge that leads to a stage belongs to the stage's first block, as in the reference's names.

    Args:
        name: dotted path.
        depths: blocks of each stage.
    """
    part, _, rest = name.partition(".")
    if part in ("head", "head_norm"):
        return sum(depths) + 1
    if match := re.match(r"blocks\.(\d+)\.", rest):
        return int(match[1]) + 1
    if match := re.match(r"stages\.(\d+)\.(?:blocks\.(\d+)|merge)\.", rest):
        return sum(depths[: int(match[1])]) + int(match[2] or 0) + 1
    return 0  # patches, their norm, positions and class token


def layer_scales(params: Params, depths: Sequence[int], decay: float) -> Any:  # noqa: ANN401 - a pytree alike
    """What the learning rate of each parameter is multiplied with: decay ** (layers - layer)."""
    return _map_by_name(lambda name, _: decay ** (sum(depths) + 1 - layer_number(name, depths)), params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW's direction, scaled layer by layer: what the learning rate multiplies."""
    recipe, depths = config.optimizer, config.model.depths

    def scale(updates: Params, _params: Params | None = None) -> Params:
        return jax.tree.map(jnp.multiply, updates, layer_scales(updates, depths, recipe.layer_decay))

    parts = [
        optax.identity() if recipe.clip_norm is None else optax.clip_by_global_norm(recipe.clip_norm),
        optax.scale_by_adam(b1=recipe.beta1, b2=recipe.beta2),
        optax.add_decayed_weights(recipe.weight_decay, mask=decay_mask),
    ]
    return optax.chain(*parts, *([] if recipe.layer_decay == 1 else [optax.stateless(scale)]))


def learning_rate_schedule(
    config: ConfigDict, *, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0 to the scaled rate, then half a cosine to the final one: step -> rate.

    Args:
        config: the configuration's `optimizer`.
    """
    peak = config.base_learning_rate * batch_size / 256
    end = min(config.final_learning_rate, peak)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(total_steps, warmup_steps + 1), end)
