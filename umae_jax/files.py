"""Local files and files in Google Cloud Storage (gs://BUCKET/PATH), with atomic writes."""

import errno
import functools
import importlib.util
import logging
import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import fsspec
from etils import epath

from umae_jax.errors import UserError, require

# By default etils reads buckets through TensorFlow if installed, and gcsfs needs more permissions than reading.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

BUCKETS = "gs://"
AnyPath: TypeAlias = Path | epath.Path  # only an epath.Path may be in a bucket

# Errors of the local file system that the user can fix.
_FIXABLE = (
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE),
)


def explain(error: BaseException) -> str | None:
    """Return one sentence about an error that the user can fix, None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if raised_by_gcsfs(error):
        return (
            f"the bucket cannot be reached ({first_line(error)}); check its name, the network and your permissions, "
            "and log in with gcloud auth application-default login"
        )
    if isinstance(error, OSError) and error.errno in _FIXABLE:
        return f"{error.filename or 'a file'}: {error.strerror}; fix that or choose another path"
    return None


def raised_by_gcsfs(error: BaseException | None) -> bool:
    """Return whether gcsfs raised the error or one of its causes; the traceback decides, as error types vary."""
    while error is not None:
        modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
        if any(module.partition(".")[0] == "gcsfs" for module in modules):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether the path begins with gs://."""
    return os.fspath(path).startswith(BUCKETS)


def absolute(path: AnyPath) -> epath.Path:
    """Return the absolute path; `epath.Path.absolute` would prepend the working directory to gs:// too."""
    return epath.Path(path if in_bucket(path) else os.path.abspath(path))


def locate(text: str | os.PathLike[str], name: str) -> epath.Path:
    """Return the path that a user gives, local (~ is the home directory) or in a bucket.

    Args:
        text: the path.
        name: the flag or configuration key that holds it, for error messages.

    Raises:
        UserError: if the path is some other URL, or the bucket cannot be reached.
    """
    if not in_bucket(text):
        is_local = re.match(r"\w+://|gs:/", os.fspath(text)) is None
        require(is_local, f"{name}: {text} is neither a local path nor in a bucket; write {BUCKETS}BUCKET/PATH")
        return epath.Path(text).expanduser()
    installed = importlib.util.find_spec("gcsfs") is not None
    require(installed, f'{name}: {BUCKETS} needs gcsfs; install it with pip install "umae_jax[gcs]"')
    _gcs()
    path = epath.Path(text)
    try:
        path.exists()
    except Exception as error:  # gcsfs raises many types
        raise UserError(f"{name}: {path}: {explain(error) or first_line(error)}") from None
    return path


def locate_local(text: str | os.PathLike[str], name: str) -> Path:
    """Return the path that a user gives, which must be local."""
    require(not in_bucket(text), f"{name}: {text} is in a bucket; write a local path")
    return Path(locate(text, name))


@functools.cache
def _gcs() -> fsspec.AbstractFileSystem:
    """Return the gcsfs file system; its settings also apply to the instance that etils creates."""
    settings = fsspec.config.conf.setdefault("gcs", {})
    settings["use_listings_cache"] = False  # other processes write, too
    settings["requests_timeout"] = 60  # seconds; the default is none
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of every error it raises
    return fsspec.filesystem("gcs")


def read_file(path: str) -> bytes:
    """Return the content of a file; one in a bucket takes one request, with epath two."""
    if in_bucket(path):
        return _gcs().cat_file(path.removeprefix(BUCKETS))
    with open(path, "rb", buffering=0) as file:
        return file.read()


def files_in_bucket(folder: AnyPath) -> list[str]:
    """Return the paths of all files below a folder in a bucket, in one request; epath needs one per subfolder."""
    return [f"{BUCKETS}{file}" for file in _gcs().find(str(folder).removeprefix(BUCKETS))]


def write_atomic(path: AnyPath, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: if a local file cannot be written; it names the file.
        UserError: if a file in a bucket cannot be written.
    """
    if not in_bucket(path):
        write_together({path: data})
        return
    try:
        path.write_bytes(data)  # an object appears once its upload is complete
    except Exception as error:
        raise UserError(f"{path} could not be written: {explain(error) or first_line(error)}") from error


def write_together(files: Mapping[AnyPath, bytes] | Mapping[Path, bytes]) -> None:
    """Write several local files or none: write all to temporary files, then rename them.

    Raises:
        OSError: if a file cannot be written; it names the file.
    """
    temporary = {path: path.with_name(f".{path.name}.part") for path in files}
    path: AnyPath = next(iter(files))
    try:
        for path, data in files.items():
            with open(temporary[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    except OSError as error:
        for part in temporary.values():
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def move_folder(folder: epath.Path, target: epath.Path) -> None:
    """Move a folder, replacing `target`; epath renames only into folders that exist, which buckets lack."""
    target.rmtree(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    system, source = fsspec.core.url_to_fs(str(folder))
    system.mv(source, fsspec.core.url_to_fs(str(target))[1], recursive=True)
