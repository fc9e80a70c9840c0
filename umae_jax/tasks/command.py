"""The main function of every training command."""

from absl import flags
from ml_collections import ConfigDict

from umae_jax import cli, console, multihost
from umae_jax.errors import require
from umae_jax.files import AnyPath, locate
from umae_jax.multihost import StopSignal
from umae_jax.tasks import make_task
from umae_jax.training import run


def train(config: ConfigDict, workdir: AnyPath, command: str, step_timeout: float | None = None) -> str | None:
    """Train a configuration in a directory, or continue its run there; SIGTERM and SIGINT save and exit.

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
    return task.result(workdir)


def run_command(command: str) -> None:
    """Parse the flags of a training command and run it."""
    config_flag = cli.define_config()
    workdir_flag = flags.DEFINE_string("workdir", None, "Directory for checkpoints, metrics and everything else.")
    step_timeout = flags.DEFINE_float("step_timeout", 0, "Max seconds per training step; 0: no limit.", 0)
    cluster = multihost.ClusterFlags()

    def main() -> None:
        config = cli.read_config(config_flag)
        workdir = locate(cli.required(workdir_flag, "a directory for what the run produces"), "--workdir")
        cli.join(cluster, config, workdir, preemption=True)
        if line := train(config, workdir, command, step_timeout.value or None):
            console.result(line)

    cli.run(main)
