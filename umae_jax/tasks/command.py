"""Training of any task, as the commands and the Python API run it."""

from ml_collections import ConfigDict

from umae_jax.console import say
from umae_jax.errors import require
from umae_jax.files import AnyPath
from umae_jax.multihost import StopSignal
from umae_jax.tasks import make_task
from umae_jax.training import run
from umae_jax.training.finish import warn_on_error


def train(config: ConfigDict, workdir: AnyPath, command: str, step_timeout: float | None = None) -> str | None:
    """Train a configuration in a directory, or continue its run there, and print what to do next.

    SIGTERM and SIGINT save and exit.

    Args:
        config: of the run; the task may complete it from the data.
        workdir: the run's directory.
        command: must be the command of the task.
        step_timeout: see `run.train`.

    Returns:
        The task's result, a line to print, if any.

    Raises:
        Preempted, UserError: see `run.train`.
    """
    with StopSignal() as stop:
        task = make_task(config)
        require(
            task.command == command,
            f"model.method: {config.model.method} is not trained by {command}; use python -m umae_jax.{task.command}",
        )
        run.train(task, workdir, stop, step_timeout)
    result = task.result(workdir)
    with warn_on_error("what to do next"):
        steps = task.next_steps(workdir)
        if steps:
            say("What to do next:\n" + "\n".join(f"  # {purpose}\n  {command}" for purpose, command in steps.items()))
    return result
