"""Compiled programs are kept on disk, so that the same command starts sooner the next time."""

import contextlib
import os
import shutil
import warnings
from pathlib import Path

import jax

from umae_jax.files import AnyPath, in_bucket

FOLDER = "compiled"  # in the directory of a run that several processes share
MAX_BYTES = 2 * 2**30
ROOM = 2**30  # bytes that must be free: JAX leaves a part of what it could not write, and reads it ever after
MIN_SECONDS = 0.2  # a program that compiles faster is not worth a file


def keep_for_user() -> None:
    """Keep programs in the user's cache directory, $XDG_CACHE_HOME/umae_jax or ~/.cache/umae_jax."""
    with contextlib.suppress(RuntimeError):  # there is no home
        keep(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "umae_jax")


def keep(folder: AnyPath | None) -> None:
    """Have JAX keep compiled programs in a folder; where that cannot be written nothing is kept, nor said.

    To be called before JAX compiles. JAX's own variables win: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false has nothing kept.

    Of a program's key are the versions of JAX and XLA, XLA's flags, the kind of the devices and their arrangement, and
    the features of the processor where that is the device; so machines may share a folder.

    Args:
        folder: of this machine, where the programs written last are left, MAX_BYTES of them; or in a bucket. None
            keeps nothing.
    """
    enabled: bool = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not enabled:
        return
    if folder is not None and not in_bucket(folder):
        folder = Path(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever may write here has us run his programs
            _prune(folder, MAX_BYTES)
            usable = os.access(folder, os.R_OK | os.W_OK | os.X_OK) and shutil.disk_usage(folder).free > ROOM
        except OSError:
            usable = False
        folder = folder if usable else None
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if folder is None or in_bucket(folder):
        jax.config.update("jax_persistent_cache_enable_xla_caches", None)  # XLA itself cannot reach buckets
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache", UserWarning)  # costs time alone


def _prune(folder: Path, most: int) -> None:
    """Delete the programs that were written first, so that `most` bytes are left.

    JAX can do this itself (jax_compilation_cache_max_size), but locks the folder for each reading and writing, which
    not all shared file systems can.
    """
    left = 0
    for status, file in sorted(
        ((file.stat(), file) for file in folder.glob("*-cache")), key=lambda found: found[0].st_mtime, reverse=True
    ):
        left += status.st_size
        if left > most:
            file.unlink(missing_ok=True)  # another process may do the same
