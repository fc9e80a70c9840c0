"""Settings that stay, and commands that continue where they stopped, for the experiments in configs/."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags


def keep_settings(workdir: Path, settings: Iterable[flags.FlagHolder]) -> dict[str, Any]:
    """Return the values of flags; exit if the directory was started with others."""
    values = {flag.name: flag.value for flag in settings}
    path = workdir / "settings.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n")
    before = json.loads(path.read_text())
    if changed := [name for name, value in values.items() if before.get(name) != value]:
        sys.exit(f"{workdir} was started with other --{', --'.join(changed)}; see {path}, or choose another --workdir")
    return values


def run_training(command: str, arguments: Sequence[str], workdir: Path) -> resource.struct_rusage:
    """Run a training command in a directory, with its output in log.txt, and return its use of resources.

    Exit if the command fails.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"umae_jax.{command}", *arguments, "--workdir", str(workdir)],
            stdout=log,
            stderr=log,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} in {workdir} failed; read {workdir / 'log.txt'}")
    return usage


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
