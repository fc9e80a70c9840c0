"""AdamW after SPEC 10, but for the learning rate, which the step applies (see `step.py`)."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def decay_mask(params: Any) -> Any:  # noqa: ANN401 - any pytree
    """True where weight decay applies: on every parameter of more than one dimension."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW's direction: what the learning rate multiplies.

    Args:
        config: the configuration's `optimizer`.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def learning_rate_schedule(
    config: ConfigDict, *, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0 to the scaled rate, then half a cosine to 0: step -> rate.

    Args:
        config: the configuration's `optimizer`.
    """
    peak = config.base_learning_rate * batch_size / 256
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(total_steps, warmup_steps + 1))
