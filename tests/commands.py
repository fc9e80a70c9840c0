"""Running the commands as a user does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def xla_flags(devices=1):
    """Return XLA_FLAGS for simulated devices and fast compilation: the models are too small to need optimised code."""
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )


def start(module, *arguments, devices=8, environment=None):
    """Start `python -m umae_jax.MODULE ARGUMENTS` in the repository's root."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(devices),
        **(environment or {}),
    }
    return subprocess.Popen(
        [sys.executable, "-m", f"umae_jax.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_together(module, *arguments, processes=2, devices=4, differing=None, environments=None):
    """Start a command as several processes.

    Args:
        devices: per process.
        differing: arguments of each process alone.
        environments: variables of each process alone.
    """
    address = f"localhost:{free_port()}"
    return [
        start(
            module,
            *arguments,
            *(f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={index}"),
            *(differing[index] if differing else ()),
            devices=devices,
            environment=environments[index] if environments else None,
        )
        for index in range(processes)
    ]


def free_port():
    """Return a free port of this machine."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def end(started, statuses=None):
    """Wait for processes to end, check their statuses, and return what each printed: (output, errors)."""
    printed = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == (statuses or [0] * len(started)), printed
    return printed


def run(module, *arguments, devices=8, status=0):
    """Run it to its end, check its exit status, and return what it printed: (output, errors)."""
    with start(module, *arguments, devices=devices) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == status, (process.returncode, output, errors)
    return output, errors


def pretrain(workdir, *overrides, config="tests/tiny.py", **options):
    """Run a small pre-training."""
    return run("pretrain", "--config", config, "--workdir", workdir, *overrides, **options)


def finetune(workdir, *overrides, config="tests/tiny_classifier.py", **options):
    """Run a small fine-tuning."""
    return run("finetune", "--config", config, "--workdir", workdir, *overrides, **options)


def lines_of(errors):
    """Return the lines on the terminal, without what XLA prints when processes connect."""
    return [line for line in errors.splitlines() if "[Gloo]" not in line]


def lines(workdir):
    """A run's metrics without those that time tells."""
    read = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("images_per_second", "data_wait")} for line in read
    ]


def losses(workdir):
    """The steps and losses of a run's metrics."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
