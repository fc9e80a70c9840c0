"""Directories of runs, without training."""

import jax
from jax.sharding import AxisType

from umae_jax.config import CONFIG_FILE, to_json
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.runs import describe, start_from


def store(workdir, config, params, step=7):
    """Write a run whose newest checkpoint holds these parameters."""
    # On one device, which is written much faster than on the eight.
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    run = describe(config, mesh)
    workdir.mkdir(parents=True)
    (workdir / CONFIG_FILE).write_text(to_json(config))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(step, start_from(run, params), samples=0)
    checkpoints.wait()
    checkpoints.close()
