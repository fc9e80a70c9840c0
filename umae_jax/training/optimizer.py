"""AdamW (SPEC 10) without the learning rate, which the training step applies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from umae_jax.training.task import Params

DROP = 10  # the rate is divided by it at the steps of `decay_at`


def _map_by_name(function: Callable[[str, jax.Array], Any], params: Params) -> Any:  # noqa: ANN401 - a pytree alike
    """Map a function of a dotted path, such as "encoder.stages.0.blocks.1.qkv.kernel", and an array over a pytree."""

    def of_leaf(path: tuple[Any, ...], leaf: jax.Array) -> Any:  # noqa: ANN401
        return function(jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def decay_mask(params: Params) -> Any:  # noqa: ANN401 - a pytree alike
    """Return True where weight decay applies: arrays of two or more dimensions, except position embeddings."""
    return _map_by_name(lambda name, param: param.ndim > 1 and not name.endswith("positions.table"), params)


def layer_scales(params: Params, layer_index: Callable[[str], tuple[int, int]], decay: float) -> Any:  # noqa: ANN401
    """Return the factor of each parameter's learning rate: decay ** (last layer - layer) (SPEC 10).

    `layer_index` maps a parameter's name to its layer and the last layer; it raises ValueError for an unknown name.
    """

    def scale(name: str, _: jax.Array) -> float:
        layer, last = layer_index(name)
        return decay ** (last - layer)

    return _map_by_name(scale, params)


def make_optimizer(
    recipe: ConfigDict, layer_index: Callable[[str], tuple[int, int]] | None = None, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """Build AdamW's update direction: clipped, decayed, and scaled per layer.

    Args:
        recipe: the configuration's `optimizer`.
        layer_index: see `layer_scales`; required if the recipe has a `layer_decay` other than 1.
        frozen: prefixes of the names of parameters that get zero updates and no state.
    """
    parts = [
        optax.identity() if recipe.clip_norm is None else optax.clip_by_global_norm(recipe.clip_norm),
        optax.scale_by_adam(b1=recipe.beta1, b2=recipe.beta2),
        optax.add_decayed_weights(recipe.weight_decay, mask=decay_mask),
    ]
    decay = recipe.get("layer_decay", 1.0)
    if decay != 1:
        assert layer_index is not None

        def scale(updates: Params, _params: Params | None = None) -> Params:
            return jax.tree.map(jnp.multiply, updates, layer_scales(updates, layer_index, decay))

        parts.append(optax.stateless(scale))
    optimizer = optax.chain(*parts)
    if not frozen:
        return optimizer

    def labels(params: Params) -> Params:
        return _map_by_name(lambda name, _: "frozen" if name.startswith(frozen) else "trained", params)

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def learning_rate_schedule(
    recipe: ConfigDict, *, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Build the schedule, step -> rate: linear warm-up from 0 to the peak rate, then cosine decay to the final rate.

    If the recipe has `decay_at`, the rate is instead divided by 10 after each of these parts of the run. The peak rate
    is proportional to the global batch size. `recipe` is the configuration's `optimizer`.
    """
    peak = recipe.base_learning_rate * batch_size / 256
    if decay_at := recipe.get("decay_at", None):
        drops = {max(0, round(part * total_steps) - warmup_steps): 1 / DROP for part in decay_at}
        warmup = optax.linear_schedule(0.0, peak, warmup_steps)
        return optax.join_schedules([warmup, optax.piecewise_constant_schedule(peak, drops)], [warmup_steps])
    end = min(recipe.final_learning_rate, peak)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(total_steps, warmup_steps + 1), end)
