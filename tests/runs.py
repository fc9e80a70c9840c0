"""Directories of runs, written without training."""

import jax
import jax.numpy as jnp
import optax

from umae_jax.config import CONFIG_FILE, to_json
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.state import init_state


def store(workdir, config, params, step=7):
    """Write a run whose newest checkpoint holds these parameters, but no optimizer state to continue from."""
    workdir.mkdir(parents=True)
    (workdir / CONFIG_FILE).write_text(to_json(config))
    params = jax.tree.map(jnp.asarray, params)  # on one device: written much faster than from eight
    checkpoints = Checkpoints(workdir)
    ema = config.optimizer.ema_decay is not None
    checkpoints.save(step, init_state(params, optax.identity(), ema=ema), {"samples": 0})
    checkpoints.wait()
    checkpoints.close()
