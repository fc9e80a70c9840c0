"""Where files lie: on this machine or in a bucket, gs://BUCKET/PATH. They are written whole or not at all."""

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from etils import epath

from umae_jax.errors import UserError, require

BUCKETS = "gs://"
AnyPath: TypeAlias = Path | epath.Path  # the second where it lies in a bucket


def locate(text: str | os.PathLike[str], name: str = "") -> AnyPath:
    """The path that a user means: of this machine, with ~ for home, or in a bucket.

    Args:
        text: the path.
        name: of the flag or key that it comes from.

    Raises:
        UserError: if it names a bucket that cannot be reached, or what reaches buckets is not installed.
    """
    if not in_bucket(text):
        return Path(text).expanduser()
    where = f"{name}: " if name else ""
    path = _in_bucket(os.fspath(text), where)
    try:
        path.exists()
    except Exception as error:  # of the network, of credentials, of the service
        raise UserError(
            f"{where}{path} cannot be reached ({_first_line(error)}); check its name and the network, and log in with "
            "gcloud auth application-default login"
        ) from None
    return path


def read_file(path: str) -> bytes:
    """All of a file, here or in a bucket."""
    return (_in_bucket(path, "") if in_bucket(path) else Path(path)).read_bytes()


def locate_here(text: str | os.PathLike[str], name: str) -> Path:
    """The path of something that only this machine's disk can hold.

    Raises:
        UserError: if it names a bucket.
    """
    require(not in_bucket(text), f"{name}: {text} is in a bucket; name a path of this machine")
    return Path(text).expanduser()


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path begins with gs://."""
    return os.fspath(path).startswith(BUCKETS)


@functools.cache
def _prepare(where: str) -> None:
    """Set up, once in a process, what reaches buckets."""
    require(
        importlib.util.find_spec("gcsfs") is not None,
        f'{where}{BUCKETS} needs what reaches buckets; install it with pip install "umae_jax[gcs]"',
    )
    import fsspec

    # Others write there too: what was listed a moment ago says nothing of what is there now.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # prints the traceback of what it raises as well


def _in_bucket(path: str, where: str) -> epath.Path:
    _prepare(where)
    return epath.Path(path)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def write_whole(path: AnyPath, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        OSError: naming the file of this machine that cannot be written.
        UserError: likewise in a bucket.
    """
    if isinstance(path, Path):
        write_together({path: data})
        return
    try:
        path.write_bytes(data)  # an object appears when all of it has come
    except Exception as error:
        raise UserError(
            f"{path} could not be written ({_first_line(error)}); check that the bucket is there and that you may "
            "write to it, or name another place"
        ) from error


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together: none of them takes its name before all have been written."""
    temporary = {path: path.with_name(f".{path.name}.part") for path in files}
    path = next(iter(files))
    try:
        for path, data in files.items():
            with temporary[path].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            temporary[path].replace(path)
    except OSError as error:
        for part in temporary.values():
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def move_folder(folder: AnyPath, to: AnyPath) -> None:
    """Move a folder; what was there in its place is lost."""
    import fsspec

    to.parent.mkdir(parents=True, exist_ok=True)
    system, place = fsspec.core.url_to_fs(str(to))
    if system.exists(place):
        system.rm(place, recursive=True)
    system.mv(str(folder), str(to), recursive=True)


class GrowingObject:
    """A file in a bucket that grows. Nothing can be appended to what lies there, so `flush` writes all of it anew.

    Args:
        path: of the object.
        data: what it begins with.
    """

    def __init__(self, path: AnyPath, data: bytes = b"") -> None:
        self._path = path
        self._data = bytearray(data)
        self._written = -1

    def write(self, data: bytes) -> int:
        """Append; it is there with the next `flush`."""
        self._data += data
        return len(data)

    def flush(self) -> None:
        """Write what has been appended.

        Raises:
            UserError: if it cannot be written.
        """
        if self._written != len(self._data):
            write_whole(self._path, bytes(self._data))
            self._written = len(self._data)

    def close(self) -> None:
        """Write what has been appended."""
        self.flush()
