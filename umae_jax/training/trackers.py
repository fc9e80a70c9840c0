"""Optional trackers of experiments: Weights & Biases and MLflow.

Account, server and project are set up by the environment variables of each: WANDB_PROJECT, WANDB_MODE and others;
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and others. A run that continues also continues its tracked run, whose id
is in DIR/trackers.json.
"""

import importlib.util
import io
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Protocol

from ml_collections import ConfigDict
from PIL import Image

from umae_jax.config import CONFIG_FILE, flat, to_json
from umae_jax.errors import UserError, require
from umae_jax.files import AnyPath, first_line, in_bucket, write_atomic

TRACKERS_FILE = "trackers.json"  # in a run's directory: id of the tracked run, by tracker
PROJECT = "umae_jax"  # where the environment names no other


class Tracker(Protocol):
    """A tracked run.

    Attributes:
        id: of the tracked run.
        place: the address of the tracked run or its server, for the terminal.
    """

    id: str
    place: str

    def log(self, step: int, values: dict[str, float | int]) -> None:
        """Send the metrics of a step."""

    def show(self, step: int, name: str, png: bytes) -> None:
        """Send a picture."""

    def close(self, *, finished: bool) -> None:
        """Send what is left and mark the tracked run as finished or interrupted."""


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: ConfigDict, workdir: AnyPath, run_id: str | None) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            id=run_id,
            resume="allow",
            dir=None if in_bucket(workdir) else str(workdir),
            config=flat(config),
            allow_val_change=True,  # a run may continue with another total_steps
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A run that continues repeats the steps since its checkpoint; W&B's own step cannot go back.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id
        self.place = str(self._run.dir if self._run.offline else self._run.url)

    def log(self, step: int, values: dict[str, float | int]) -> None:
        """See `Tracker.log`."""
        self._run.log({"step": step, **values})

    def show(self, step: int, name: str, png: bytes) -> None:
        """See `Tracker.show`."""
        with Image.open(io.BytesIO(png)) as picture:
            self._run.log({"step": step, name: self._image(picture)})

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """A run of MLflow."""

    def __init__(self, config: ConfigDict, workdir: AnyPath, run_id: str | None) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log the tables that they create
        self._client, self._metric = mlflow.MlflowClient(), Metric
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment_id, run_name=workdir.name).info.run_id
            # Parameters cannot change; the artifact below is that of the last start.
            self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flat(config).items()])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._client.log_text(run_id, to_json(config), CONFIG_FILE)
        self.id, self.place = run_id, f"run {run_id} in {mlflow.get_tracking_uri()}"

    def log(self, step: int, values: dict[str, float | int]) -> None:
        """See `Tracker.log`."""
        now = int(1000 * time.time())
        self._client.log_batch(self.id, [self._metric(key, value, now, step) for key, value in values.items()])

    def show(self, step: int, name: str, png: bytes) -> None:
        """See `Tracker.show`."""
        with Image.open(io.BytesIO(png)) as picture:
            self._client.log_image(self.id, picture, key=name, step=step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


# By the name of the package.
_TRACKERS: dict[str, Callable[[ConfigDict, AnyPath, str | None], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_installed(name: str) -> None:
    """Check that the package of a tracker is installed, without importing it."""
    require(
        name not in _TRACKERS or importlib.util.find_spec(name) is not None,
        f'tracker: {name} is not installed; install it with pip install "umae_jax[{name}]", or write '
        "--config.tracker=none",
    )


def open_tracker(config: ConfigDict, workdir: AnyPath) -> Tracker | None:
    """Open the tracked run of a directory, a new one if it has none; None without a tracker.

    Raises:
        UserError: if the tracker cannot be reached or does not know the run.
        OSError: if the id cannot be written.
    """
    name, file = config.tracker, workdir / TRACKERS_FILE
    if name not in _TRACKERS:
        return None
    ids = json.loads(file.read_bytes()) if file.exists() else {}
    try:
        tracker = _TRACKERS[name](config, workdir, ids.get(name))
    except Exception as error:  # each has its own types
        again = f", remove {file} to track a new run," if name in ids else ""
        raise UserError(
            f"tracker: {name} cannot start ({first_line(error)}); check its environment variables{again} or write "
            "--config.tracker=none"
        ) from error
    write_atomic(file, json.dumps(ids | {name: tracker.id}).encode())
    return tracker
