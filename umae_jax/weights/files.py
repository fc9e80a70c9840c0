"""Files of weights: `.safetensors`, `.pth` and `.npz`, read without running anything that lies in them."""

import argparse
import io
import pathlib
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from umae_jax.errors import UserError, require
from umae_jax.files import write_whole

INSTALL_TORCH = 'install torch: pip install "umae_jax[torch]"'


class Weights(NamedTuple):
    """What a file holds: arrays by name, and strings by name."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_weights(path: Path) -> Weights:
    """Read a file of weights, as float32.

    Raises:
        UserError: if it is no such file, is damaged, or would run code.
    """
    require(path.is_file(), f"there is no file {path}")
    require(
        path.suffix in _READERS,
        f"{path}: a file of weights ends in {', '.join(_READERS)}; rename it if it is one of them",
    )
    tensors, metadata = _READERS[path.suffix](path)
    require(bool(tensors), f"{path} holds no weights")
    try:
        return Weights({name: array.astype(np.float32) for name, array in tensors.items()}, metadata)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds more than numbers ({error})") from None


def _read_safetensors(path: Path) -> Weights:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Weights({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error})") from None


def _read_npz(path: Path) -> Weights:
    """An archive of arrays; where some names begin with "param/", these are the weights."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = [name for name in archive.files if name.startswith("param/")] or archive.files
            return Weights({name.removeprefix("param/"): archive[name] for name in names}, {})
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole .npz archive of plain arrays ({error})") from None


def _inert_classes() -> list[Any]:
    """What the arguments of a training run are made of: classes that hold values and do nothing."""
    functions = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    aliases = [  # NumPy 1 knew the two under another name
        (function, f"{module}.multiarray.{name}")
        for name, function in functions.items()
        for module in ("numpy.core", "numpy._core")
    ]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.ndarray, np.dtype, *dtypes, *aliases]


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
        with torch.serialization.safe_globals(_inert_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} would run {refused[1]}, which weights have no need of; nothing was run") from None
        reason = str(error).strip().splitlines() or ["no message"]
        raise UserError(
            f"{path} is no whole file of weights that torch wrote; nothing in it was run "
            f"({type(error).__name__}: {reason[0][:200]})"
        ) from None
    state, metadata = content, {}
    if isinstance(content, dict):
        state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
        metadata = content.get("metadata", {})
    require(
        isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values()),
        f"{path} holds no dictionary of tensors, alone or under 'model' or 'state_dict'",
    )
    tensors = {str(name): value.detach().to(torch.float32).numpy() for name, value in state.items()}
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


def write_weights(path: Path, weights: Weights) -> None:
    """Write a file of weights, whole or not at all; a `.pth` as a dict with "model" and "metadata"."""
    if path.suffix == ".safetensors":
        data = safetensors.numpy.save(weights.tensors, weights.metadata)
    else:
        import torch

        state = {name: torch.from_numpy(array.copy()) for name, array in weights.tensors.items()}
        buffer = io.BytesIO()
        torch.save({"model": state, "metadata": weights.metadata}, buffer)
        data = buffer.getvalue()
    write_whole(path, data)
