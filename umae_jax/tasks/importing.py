"""Create a run's directory from a weight file."""

import contextlib
import json
import shutil
import time
from pathlib import Path

from ml_collections import ConfigDict

from umae_jax.config import CONFIG_FILE, to_json
from umae_jax.errors import UserError, naming, require
from umae_jax.files import AnyPath, write_atomic
from umae_jax.tasks import make_task
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.sharding import make_mesh
from umae_jax.training.state import abstract_run, initialize
from umae_jax.weights.exchange import read_model
from umae_jax.weights.names import from_reference
from umae_jax.weights.stored_run import CLASSES_FILE

INCOMING = ".incoming"  # subfolder where the run's files are written before they move


def import_weights(file: AnyPath, workdir: Path, config: ConfigDict | None = None) -> ConfigDict:
    """Create a run's directory, at step 0, from a weight file, or leave nothing behind. Return its configuration.

    Args:
        file: the weight file.
        workdir: the directory; it must be empty or not exist.
        config: see `read_model`.

    Raises:
        UserError: if the file is invalid or does not fit the model, or the directory cannot be used.
    """
    workdir = workdir.absolute()
    incoming = workdir / INCOMING
    require(
        not workdir.exists() or (workdir.is_dir() and not set(workdir.iterdir()) - {incoming}),
        f"--workdir: {workdir} is not empty; choose another directory",
    )
    with naming("FILE"):
        config, tensors, classes = read_model(file, config)
    task = make_task(config)
    run = abstract_run(task, make_mesh())
    require(
        "backbone" not in run.state.params,
        f"FILE: {file} holds a detector, which starts a run of umae_jax.detect; write --config.init={file}",
    )
    with naming("FILE"):
        params = from_reference(config, run.state.params, tensors, name=str(file))
    existed = workdir.exists()
    shutil.rmtree(incoming, ignore_errors=True)  # of an import that was killed
    incoming.mkdir(parents=True)
    try:
        checkpoints = Checkpoints(incoming)
        try:
            checkpoints.save(0, initialize(task, run, params), {"samples": 0})
            checkpoints.wait()
        finally:
            with contextlib.suppress(Exception):  # `save` or `wait` raised it already
                checkpoints.close()
        if classes:
            write_atomic(incoming / CLASSES_FILE, json.dumps(classes).encode())
        write_atomic(incoming / CONFIG_FILE, to_json(config).encode())
        # A directory with a configuration counts as a run, so the configuration moves last.
        for path in sorted(incoming.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            path.replace(workdir / path.name)
    except BaseException as error:
        for _ in range(10):  # after a failure Orbax goes on writing other arrays for a moment
            shutil.rmtree(incoming if existed else workdir, ignore_errors=True)
            time.sleep(0.1)
        if isinstance(error, UserError):
            raise UserError(f"--workdir: cannot write {workdir}; make room or choose another directory") from error
        raise
    incoming.rmdir()
    return config
