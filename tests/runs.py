"""Directories of runs, written without training."""

import jax
from jax.sharding import AxisType

from umae_jax.config import CONFIG_FILE, to_json
from umae_jax.tasks import make_task
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.state import abstract_run, initialize


def store(workdir, config, params, step=7):
    """Write a run whose newest checkpoint holds these parameters."""
    # One device: written much faster than from eight.
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    task = make_task(config)
    workdir.mkdir(parents=True)
    (workdir / CONFIG_FILE).write_text(to_json(config))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(step, initialize(task, abstract_run(task, mesh), params), {"samples": 0})
    checkpoints.wait()
    checkpoints.close()
