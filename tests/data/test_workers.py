"""Worker processes end, and their shared memory is freed, however the run or one of them is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.images import write_folder

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

STREAM = """
import os, sys
from umae_jax.data.pipeline import Readers, TrainLoader
from umae_jax.data.sources import open_source
from umae_jax.data.transforms import LoadCrop
from umae_jax.training.sharding import batch_sharding, make_mesh

source = open_source("folder:" + sys.argv[1])
loader = TrainLoader(
    len(source), LoadCrop(source, 1, (64, 64), 3, 0.2),
    batch_size=8, sharding=batch_sharding(make_mesh()), seed=1, readers=Readers(1, 2),
)
for _ in range(2):
    next(loader)
print("reading", flush=True)
if sys.argv[2] == "exits":
    sys.stdin.readline()
    os._exit(3)
while True:
    next(loader)
"""


def children(pid):
    """Return the processes that `pid` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def workers_of(pid):
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def shared():
    """Return the names of the shared memory and semaphores that multiprocessing created, in other tests too."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "sem.mp-"))}


@pytest.mark.parametrize("killed", ["main", "exits", "group", "worker", "main and worker"])
def test_workers_and_shared_memory_go_with_their_run(tmp_path, killed):
    before = shared()
    run = subprocess.Popen(
        [sys.executable, "-c", STREAM, str(write_folder(tmp_path, 8)), killed],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert run.stdout.readline() == "reading\n"
        family = children(run.pid)
        workers = workers_of(run.pid)
        used = shared() - before
        assert len(workers) == 2
        assert used
        if killed == "exits":
            run.communicate("\n", timeout=30)
        elif killed == "group":
            os.killpg(run.pid, signal.SIGKILL)
        else:
            if killed != "main":
                os.kill(workers[0], signal.SIGKILL)
            if killed != "worker":
                os.kill(run.pid, signal.SIGKILL)
        assert run.wait(30) != 0
        deadline = time.monotonic() + 20
        while (any(map(is_running, family)) or len(used & shared()) > 1) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in family if is_running(pid)]
        # A worker that is killed between creating a segment and registering it leaves that one.
        assert len(used & shared()) <= 1
    finally:
        run.kill()
        run.communicate()
