"""Where files lie: on this machine or in a bucket, gs://BUCKET/PATH. They are written whole or not at all."""

import errno
import functools
import importlib.util
import logging
import os
import re
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import fsspec
from etils import epath

from umae_jax.errors import UserError, require

# etils takes TensorFlow for buckets where that is installed; gcsfs asks for more rights than reading needs.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

BUCKETS = "gs://"
AnyPath: TypeAlias = Path | epath.Path  # the second where it lies in a bucket

# Failures of the file system that are the user's to mend, and say so themselves.
_MENDABLE = (
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE),
)


def explain(error: BaseException) -> str | None:
    """What a failure to read or write means to the user, as a sentence; None if it is not the user's to mend."""
    if isinstance(error, UserError):
        return str(error)
    if of_bucket(error):
        return (
            f"what lies in a bucket cannot be reached ({_first_line(error)}); check its name, the network, and that "
            "you may read and write there, and log in with gcloud auth application-default login"
        )
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        return f"{error.filename or 'a file'}: {error.strerror}; mend that or name another place"
    return None


def reason(error: Exception) -> str:
    """Why a place that is tried out will not do, whatever the system says of it.

    Raises:
        Exception: the error itself, if it is no failure to read or write.
    """
    sentence = explain(error) or (str(error) if isinstance(error, OSError) else "")
    if not sentence:
        raise error
    return sentence


def of_bucket(error: BaseException | None) -> bool:
    """Whether a bucket could not be reached.

    There are errors of many kinds, of the network, of credentials, of the service; they are known by where they come
    from.
    """
    while error is not None:
        modules = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
        if any(module.partition(".")[0] == "gcsfs" for module in modules):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path begins with gs://."""
    return os.fspath(path).startswith(BUCKETS)


def locate(text: str | os.PathLike[str], name: str) -> AnyPath:
    """The path that a user means: of this machine, with ~ for home, or in a bucket.

    Args:
        text: the path.
        name: of the flag or key that it comes from.

    Raises:
        UserError: if it lies elsewhere, in a bucket that cannot be reached, or what reaches buckets is not installed.
    """
    if not in_bucket(text):
        scheme = re.match(r"\w+://|gs:/", os.fspath(text))
        require(
            scheme is None, f"{name}: {text} is neither of this machine nor in a bucket; write {BUCKETS}BUCKET/PATH"
        )
        return Path(text).expanduser()
    require(
        importlib.util.find_spec("gcsfs") is not None,
        f'{name}: {BUCKETS} needs what reaches buckets; install it with pip install "umae_jax[gcs]"',
    )
    _buckets()
    path = epath.Path(text)
    try:
        path.exists()
    except Exception as error:  # whatever is wrong with it
        raise UserError(f"{name}: {path}: {explain(error) or _first_line(error)}") from None
    return path


def locate_here(text: str | os.PathLike[str], name: str) -> Path:
    """The path of something that only this machine's disk can hold.

    Raises:
        UserError: if it lies elsewhere.
    """
    require(not in_bucket(text), f"{name}: {text} is in a bucket; name a path of this machine")
    path = locate(text, name)
    assert isinstance(path, Path)
    return path


@functools.cache
def _buckets() -> fsspec.AbstractFileSystem:
    """What reaches buckets, set up once in a process; what etils makes for itself takes the same settings."""
    settings = fsspec.config.conf.setdefault("gcs", {})
    settings["use_listings_cache"] = False  # others write there too
    settings["requests_timeout"] = 60  # seconds; there is none else
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # prints the traceback of what it raises as well
    return fsspec.filesystem("gcs")


def read_file(path: str) -> bytes:
    """All of a file, here or in a bucket, under the name that `files_in_bucket` gave."""
    if not in_bucket(path):
        with open(path, "rb", buffering=0) as file:
            return file.read()
    return _buckets().cat_file(path.removeprefix(BUCKETS))


def files_in_bucket(folder: epath.Path) -> list[str]:
    """The names of all files below a folder, by one question; etils would ask for each folder."""
    return [f"{BUCKETS}{file}" for file in _buckets().find(str(folder).removeprefix(BUCKETS))]


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
        raise UserError(f"{path} could not be written: {explain(error) or _first_line(error)}") from error


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
    if isinstance(to, Path):
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(to, ignore_errors=True)
        shutil.move(folder, to)
        return
    if to.exists():
        to.rmtree()
    _buckets().mv(str(folder).removeprefix(BUCKETS), str(to).removeprefix(BUCKETS), recursive=True)


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
