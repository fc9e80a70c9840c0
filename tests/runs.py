"""Directories of runs, without training."""

import jax

from umae_jax.config import CONFIG_FILE, to_json
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.mesh import make_mesh
from umae_jax.training.runs import describe
from umae_jax.training.step import init_state


def store(workdir, config, params, step=7):
    """Write a run whose newest checkpoint holds these parameters."""
    run = describe(config, make_mesh())
    shardings = jax.tree.map(lambda array: array.sharding, run.state)
    state = jax.device_put(init_state(params, run.optimizer), shardings)
    workdir.mkdir(parents=True)
    (workdir / CONFIG_FILE).write_text(to_json(config))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(step, state, samples=0)
    checkpoints.wait()
    checkpoints.close()
