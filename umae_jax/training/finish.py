"""Files that show and keep the result of a run.

None of them is needed to continue the run, so an error in writing one is a warning.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from umae_jax.console import warn
from umae_jax.files import AnyPath, explain, first_line, write_atomic
from umae_jax.multihost import is_primary
from umae_jax.training.curves import draw_curves
from umae_jax.training.sharding import gather
from umae_jax.training.task import BaseTask, Params
from umae_jax.weights.encoder_file import ENCODER_FILE, encode_encoder, encoder_of

CURVES_FILE = "loss.png"


def finish(task: BaseTask, workdir: AnyPath, params: Params, step: int) -> None:
    """Draw the pictures of a complete run, and write its encoder in one file; all processes must call it."""
    with warn_on_error("pictures of the run"):
        if is_primary():
            if curves := draw_curves(workdir, task.accuracies):
                write_atomic(workdir / CURVES_FILE, curves)
            for name, png in task.pictures(workdir).items():
                write_atomic(workdir / name, png)
    with warn_on_error(ENCODER_FILE):
        encoder: Any = gather(encoder_of(params)) if "encoder" in params or "backbone" in params else None
        if encoder is not None and is_primary():
            write_atomic(workdir / ENCODER_FILE, encode_encoder(task.config, encoder, step))


@contextlib.contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Turn an error into a warning."""
    try:
        yield
    except Exception as error:
        warn(f"{what}: not written ({explain(error) or first_line(error)}); the checkpoints are not affected")
