"""One file per task: everything that differs between pre-training, classification and other training tasks.

To add a task, add two files: `tasks/NAME.py` with a class `Task`, derived from `training.task.BaseTask`; and
`config/NAME.py` with its section of the configuration and the values of `model.method` that select it. A task of
another package adds an entry to `config.METHODS` instead.
"""

import importlib

import numpy as np
from ml_collections import ConfigDict

from umae_jax.config import METHODS
from umae_jax.errors import require
from umae_jax.training.task import BaseTask, Params


def make_task(config: ConfigDict) -> BaseTask:
    """Create the task that `model.method` selects."""
    method = config.model.method
    require(method in METHODS, f"model.method must be one of {', '.join(METHODS)}, not {method!r}")
    return importlib.import_module(METHODS[method].task).Task(config)


def state_dict(config: ConfigDict, params: Params) -> dict[str, np.ndarray]:
    """Return the tensors of a weight file; see `BaseTask.state_dict`."""
    return make_task(config).state_dict(params)
