"""Worker processes that read images: their signals, and their end when the main process dies."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection, resource_tracker, util

WORKER_GRACE = 60  # seconds that a worker outlives SIGTERM


def init_worker(_index: int, _count: int) -> None:
    """Keep a worker alive when a terminal or job signals all its processes: the main process must save first.

    A process that dies without cleaning up, as after SIGKILL, does not end its children: a worker must watch it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Not PR_SET_PDEATHSIG: its signal comes when the thread that started the worker ends.
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)  # other threads may wait for the parent forever


def start_resource_tracker() -> None:
    """Start the process that frees the shared memory of dead processes, in a session of its own.

    This is multiprocessing's resource tracker: it frees what is left once this process and its workers are gone. In
    their process group, a SIGKILL to all of them would end it too.
    """
    original = util.spawnv_passfds

    def spawn(path: bytes, args: Sequence[str], descriptors: Sequence[int]) -> int:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        try:
            return os.posix_spawn(path, list(args), os.environ, setsid=True)
        except NotImplementedError:  # this platform's C library cannot
            return original(path, args, descriptors)

    util.spawnv_passfds = spawn  # type: ignore[assignment]
    try:
        resource_tracker.ensure_running()
    finally:
        util.spawnv_passfds = original
