"""Files of weights: `.safetensors`, `.pth` and `.npz`, read without running anything that lies in them."""

import argparse
import contextlib
import io
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from umae_jax.errors import UserError, require
from umae_jax.files import AnyPath, in_bucket

INSTALL_TORCH = 'install torch: pip install "umae_jax[torch]"'


class Weights(NamedTuple):
    """What a file holds: arrays by name, and strings by name."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_weights(path: AnyPath) -> Weights:
    """Read a file of weights, as float32.

    Raises:
        UserError: if it is no such file, is damaged, or would run code.
    """
    require(path.is_file(), f"there is no file {path}")
    require(
        path.suffix in _READERS,
        f"{path}: a file of weights ends in {', '.join(_READERS)}; rename it if it is one of them",
    )
    with path.open("rb"):
        pass  # what the system refuses is told as such
    with _on_disk(path) as file:
        tensors, metadata = _READERS[path.suffix](file)
    require(bool(tensors), f"{path} holds no weights")
    return Weights({name: _single(array, f"{path}: {name}") for name, array in tensors.items()}, metadata)


@contextlib.contextmanager
def _on_disk(path: AnyPath) -> Iterator[Path]:
    """A file where what reads weights can find it: one in a bucket is fetched."""
    if not in_bucket(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        fetched = Path(folder) / path.name
        fetched.write_bytes(path.read_bytes())
        try:
            yield fetched
        except UserError as error:
            raise UserError(str(error).replace(str(fetched), str(path))) from None


def _single(array: np.ndarray, name: str) -> np.ndarray:
    """An array of real numbers as float32."""
    require(isinstance(array, np.ndarray) and array.dtype.kind in "fiub", f"{name} is no array of real numbers")
    return array.astype(np.float32)


def _read_safetensors(path: Path) -> Weights:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Weights({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except Exception as error:  # whatever a damaged file, or a kind of number that NumPy has not, makes it raise
        raise UserError(f"{path} is no whole safetensors file of plain numbers ({_first_line(error)})") from None


def _read_npz(path: Path) -> Weights:
    """An archive of arrays; where some names begin with "param/", these are the weights."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = [name for name in archive.files if name.startswith("param/")] or archive.files
            return Weights({name.removeprefix("param/"): archive[name] for name in names}, {})
    except Exception as error:  # whatever a damaged archive makes NumPy and zipfile raise
        raise UserError(f"{path} is no whole .npz archive of plain arrays ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _inert_classes() -> list[Any]:
    """What the arguments of a training run are made of: classes that hold values and do nothing."""
    functions = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    aliases = [  # NumPy 1 knew the two under another name
        (function, f"{module}.multiarray.{name}")
        for name, function in functions.items()
        for module in ("numpy.core", "numpy._core")
    ]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    # Python 3.13 calls their module another than those before it; a path of another system is none here.
    paths = [
        (pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *paths, *aliases]


def _read_pth(path: Path) -> Weights:
    """What torch.save wrote: a state dict, alone or under "model" or "state_dict", beside whatever else is harmless.

    Torch's restricted unpickler builds tensors and plain containers, and what `_inert_classes` adds; it refuses
    everything else before any of it runs.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} can be read with torch only; {INSTALL_TORCH}, or convert it to .safetensors") from None
    try:
        with torch.serialization.safe_globals(_inert_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the same as the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise, with advice to read it without this guard
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} would run {refused[1]}, which weights have no need of; nothing was run") from None
        raise UserError(
            f"{path} is no whole file of weights that torch wrote, or asks for more than tensors and plain arguments; "
            "nothing in it was run"
        ) from None
    state, metadata = content, {}
    if isinstance(content, dict):
        state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
        metadata = content.get("metadata", {})
    require(
        isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values()),
        f"{path} holds no dictionary of tensors, alone or under 'model' or 'state_dict'",
    )
    plain = [name for name, value in state.items() if value.layout == torch.strided and value.device.type == "cpu"]
    require(len(plain) == len(state), f"{path} holds tensors without plain values, such as {set(state) - set(plain)}")
    tensors = {
        str(name): (value if value.is_complex() else value.detach().to(torch.float32)).numpy()
        for name, value in state.items()
    }
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    return Weights(tensors, metadata if strings else {})


_READERS = {".safetensors": _read_safetensors, ".pth": _read_pth, ".npz": _read_npz}


def check_output(path: Path) -> None:
    """Check, before any work is done, that a file can be written under this name.

    Raises:
        UserError: saying which names there are, or what to install.
    """
    require(path.suffix in (".safetensors", ".pth"), f"--output: end {path} in .safetensors or .pth")
    require(not path.is_dir(), f"--output: {path} is a folder; name a file in it")
    if path.suffix == ".pth":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError(f"--output: to write {path}, {INSTALL_TORCH}, or end it in .safetensors") from None


def encode_weights(suffix: str, weights: Weights) -> bytes:
    """A file of weights, `.safetensors`, or `.pth` as a dict with "model" and "metadata"."""
    if suffix == ".safetensors":
        return safetensors.numpy.save(weights.tensors, weights.metadata)
    import torch

    state = {name: torch.from_numpy(array.copy()) for name, array in weights.tensors.items()}
    buffer = io.BytesIO()
    torch.save({"model": state, "metadata": weights.metadata}, buffer)
    return buffer.getvalue()
