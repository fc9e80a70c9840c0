"""The time from a command to its first step: a clock of its phases, and a cache of compiled programs on disk."""

import contextlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from umae_jax.console import duration, say
from umae_jax.files import AnyPath, in_bucket
from umae_jax.version import START_TIME

CACHE_FOLDER = "compiled"  # in the directory of a run that several processes share
MAX_CACHE_BYTES = 2 * 2**30
MIN_FREE_BYTES = 2**30  # JAX keeps, and reads later, a program that a full disk cut short
MIN_COMPILE_SECONDS = 0.2
NOTICE_SECONDS = 1.0  # `phase` announces what takes longer

_phases: dict[str, float] = {}
_last = START_TIME


def mark(phase: str) -> None:
    """Add the time since the last mark, at first the command's start, to a phase."""
    global _last
    now = time.monotonic()
    _phases[phase] = _phases.get(phase, 0.0) + now - _last
    _last = now


@contextlib.contextmanager
def phase(name: str, note: str = "") -> Iterator[None]:
    """Add the time inside to a phase of `summary`; announce a slow one, and then say how long it took."""
    mark("the configuration")
    start = time.monotonic()
    notice = threading.Timer(NOTICE_SECONDS, say, [f"{name}{note} ..."])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()
    if (seconds := time.monotonic() - start) >= NOTICE_SECONDS:
        say(f"{name}: {duration(seconds)}")
    mark(name)


def restart() -> None:
    """Start anew, for another run of the same process."""
    global _last
    _phases.clear()
    _last = time.monotonic()


def summary() -> str:
    """Return the time of all phases as one sentence; phases under half a second are left out."""
    phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in _phases.items() if seconds >= 0.5)
    return f"first step {sum(_phases.values()):.0f} s after the start: {phases}"


def use_user_cache() -> None:
    """Keep compiled programs in the user's cache directory, $XDG_CACHE_HOME/umae_jax or ~/.cache/umae_jax."""
    with contextlib.suppress(RuntimeError):  # no home directory
        use_cache(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "umae_jax")


def use_cache(folder: AnyPath | None) -> None:
    """Keep compiled programs in a folder, or nowhere if it is None or cannot be written.

    Call it before JAX compiles. JAX's own variables take precedence: JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. Machines may share a folder: a program's key includes the
    versions and flags of JAX and XLA, and the devices.
    """
    enabled: bool = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not enabled:
        return
    if folder is not None and not in_bucket(folder) and not _prepare(Path(folder)):
        folder = None
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    if folder is None or in_bucket(folder):
        jax.config.update("jax_persistent_cache_enable_xla_caches", None)  # XLA itself cannot reach buckets
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache", UserWarning)  # costs only time


def _prepare(folder: Path) -> bool:
    """Create a folder and delete its oldest programs; return whether programs can be kept there.

    jax_compilation_cache_max_size would delete too, but it needs the package filelock, locks the folder for every read
    and write, which not all shared file systems support, and fails on programs that were kept without it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private: JAX runs what it reads here
        total = 0
        programs = [(file.stat(), file) for file in folder.glob("*-cache")]
        for status, file in sorted(programs, key=lambda program: program[0].st_mtime, reverse=True):
            total += status.st_size
            if total > MAX_CACHE_BYTES:
                file.unlink(missing_ok=True)  # another process may have deleted it
        return os.access(folder, os.R_OK | os.W_OK | os.X_OK) and shutil.disk_usage(folder).free > MIN_FREE_BYTES
    except OSError:
        return False
