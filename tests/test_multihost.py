"""Flags, agreement and stop signals of processes, in one process or in small ones that do not train."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from tests import commands
from umae_jax import multihost
from umae_jax.errors import PreemptionRequested, UserError
from umae_jax.multihost import StopSignal, Watchdog


def cluster(address=None, count=None, index=None):
    values = {"coordinator_address": address, "num_processes": count, "process_id": index}
    values |= {"initialization_timeout": 2, "heartbeat_timeout": 10}
    return SimpleNamespace(**{name: SimpleNamespace(value=value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("localhost:1", None, 0), "belong together"),
        ((None, 2, None), "belong together"),
        (("localhost", 2, 0), "--coordinator_address: 'localhost'"),
        (("localhost:many", 2, 0), "--coordinator_address"),
        (("localhost:65536", 2, 0), "--coordinator_address"),
        (("localhost:1", 2, 2), "--process_id: 2"),
    ],
)
def test_wrong_flags_raise(values, message):
    with pytest.raises(UserError, match=message):
        multihost.initialize(cluster(*values))


def python(program, *arguments, **environment):
    """Start a program in the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=commands.ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slurm(index, port):
    """Environment of a process of two in a SLURM job."""
    job = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(index), "LOCALID": str(index)}
    return {f"SLURM_{name}": value for name, value in job.items()} | {"JAX_COORDINATOR_PORT": str(port)}


def test_a_single_process_connects_to_nothing():
    program = (
        "import sys; from absl import flags; from umae_jax import multihost\n"
        "cluster = multihost.ClusterFlags(); flags.FLAGS(sys.argv); multihost.initialize(cluster)\n"
        "print(multihost.jax.distributed.is_initialized(), multihost.is_primary())"
    )
    pod = python(program, KUBERNETES_SERVICE_HOST="10.0.0.1")  # outside of any job
    ignored = python(program, "--num_processes=1", **slurm(0, 1))
    assert [process.communicate(timeout=60) for process in (pod, ignored)] == [("False True\n", "")] * 2


def test_an_unknown_cluster_error_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no pod\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"no pod\).*--num_processes=1"):
        multihost.initialize(cluster())


def test_the_first_signal_asks_and_the_second_acts():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    try:
        with StopSignal() as stop:
            with pytest.raises(KeyboardInterrupt):  # there is no step to save yet
                os.kill(os.getpid(), signal.SIGINT)
            stop.listen()
            assert stop.poll() is None
            stop.check()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.poll() == stop.received == signal.SIGINT
            with pytest.raises(PreemptionRequested):
                stop.check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with StopSignal() as stop:
            stop.listen()
            stop.release()  # everything is saved
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_the_watchdog_ends_a_stuck_process_with_a_traceback():
    program = (
        "import time; from umae_jax.multihost import Watchdog\n"
        "dog = Watchdog(1)\n"
        "for _ in range(3): dog.arm(); time.sleep(0.5)\n"
        "dog.cancel(); time.sleep(1.5); print('alive', flush=True)\n"
        "dog.arm(); time.sleep(60)"
    )
    process = python(program)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output == "alive\n"
    assert "Timeout" in errors
    assert 'File "<string>", line 5' in errors
    Watchdog(0).arm()  # nothing happens


WORKER = """
import json, signal, sys, time
from absl import flags
from umae_jax import multihost
from pathlib import Path
cluster = multihost.ClusterFlags()
flags.FLAGS(sys.argv[:1])
multihost.initialize(cluster, preemption=True)
import jax
index = jax.process_index()
def attempt(fingerprint, workdir):
    try:
        multihost.check_agreement(fingerprint, workdir)
    except multihost.UserError as error:
        return str(error)
multihost.VISIBLE_SECONDS = 1
base = Path(sys.argv[1])
result = {
    "primary": multihost.is_primary(),
    "json": multihost.all_gather_json({"process": "é" * (index + 1)}),
    "first": multihost.broadcast_json(index),
    "rows": multihost.all_gather_json([[index + 0.5]] * 2 * index),
    "integers": multihost.all_gather_json(2**40 + index),
    "same": attempt({"model.depth": 3}, base / "shared"),
    "different": attempt({"model.depth": 3 + index}, base / "shared"),
    "apart": attempt({}, base / str(index)),
    "unwritable": attempt({}, Path("/proc/no")),
}
with multihost.StopSignal() as stop:
    print(json.dumps(result), flush=True)
    time.sleep(2.5 * (1 - index))  # a signal may come before the first poll
    for step in range(1000, 1000000):
        if stop.poll():
            break
        time.sleep(0.01)
print(step, stop.received, flush=True)
if index == 1:
    time.sleep(60)  # alive, but never in the collective that process 0 waits for
multihost.Watchdog(3).arm()
multihost.broadcast_json(0)
"""


def test_two_processes_agree_and_the_watchdog_ends_a_stuck_collective(tmp_path):
    """They find each other by SLURM's variables, without flags."""
    port = commands.free_port()
    started = [python(WORKER, str(tmp_path), **slurm(index, port)) for index in range(2)]
    results = []
    for process in started:
        results.append(json.loads(next(line for line in process.stdout if line.startswith("{"))))  # after Gloo's lines
    started[1].send_signal(signal.SIGINT)
    time.sleep(0.5)
    printed = [process.communicate(timeout=60) for process in started]
    assert started[0].returncode == 1, printed  # by the watchdog
    assert started[1].returncode < 0, printed  # by JAX, which lost process 0
    first, second = results
    assert [result.pop("primary") for result in results] == [True, False]
    assert all(result.pop("apart").startswith("--workdir: process 1 on ") for result in results)
    assert first == second
    assert first["json"] == [{"process": "é"}, {"process": "éé"}]
    assert first["first"] == 0
    assert first["rows"] == [[], [[1.5], [1.5]]]
    assert first["integers"] == [2**40, 2**40 + 1]
    assert first["same"] is None
    assert "process 1 on " in first["different"]
    assert "model.depth 4 where process 0 has 3;" in first["different"]
    assert first["unwritable"].startswith("--workdir: ")
    assert not list((tmp_path / "shared").iterdir())
    assert printed[0][0] == printed[1][0]  # the same step
    assert printed[0][0].endswith(f" {signal.SIGTERM:d}\n")
    assert "saving and exiting" in printed[0][1]
    assert "in broadcast_json" in printed[0][1]


CONNECT = """
import sys, time
from absl import flags
from umae_jax import multihost
cluster = multihost.ClusterFlags()
flags.FLAGS(sys.argv)
multihost.NOTICE_SECONDS = 1
multihost.initialize(cluster)
multihost.broadcast_json(0)
print("all connected", flush=True)
while True:
    multihost.broadcast_json(0)
    time.sleep(0.1)
"""


def connect(processes, *options, count=2):
    address = f"--coordinator_address=localhost:{commands.free_port()}"
    return [
        python(CONNECT, address, f"--num_processes={count}", f"--process_id={index}", *options)
        for index in range(processes)
    ]


def test_missing_processes_are_listed():
    for process in connect(2, "--initialization_timeout=5", count=3):
        _, errors = process.communicate(timeout=60)
        assert process.returncode not in (0, 143)
        assert errors.startswith("still waiting for other processes, up to 5 s")
        assert "timed out task names:\n2\n" in errors


def test_a_silent_process_ends_the_others_after_the_heartbeat_timeout():
    silent, other = connect(2, "--heartbeat_timeout=10")
    for process in (silent, other):
        assert any("all connected" in line for line in process.stdout)
    silent.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    _, errors = other.communicate(timeout=60)
    assert time.monotonic() - begin < 40  # on a busy machine
    silent.kill()
    silent.communicate()
    assert other.returncode not in (0, 2, 143)
    assert errors
