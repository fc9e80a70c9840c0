"""Read and write weight files (`.safetensors`, `.pth`, `.npz`) without running code from them."""

import argparse
import io
import json
import pathlib
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from umae_jax.console import say
from umae_jax.errors import UserError, listing, require
from umae_jax.files import AnyPath, first_line

INSTALL_TORCH = 'install torch: pip install "umae_jax[torch]"'
# Keys of a file's state dicts, "" at the top. Of several state dicts the first here is read.
STATE_DICT_KEYS = ("model", "state_dict", "", "teacher", "ema", "model_ema", "params")
# What safetensors calls the dtypes of NumPy, and bfloat16, which its NumPy reader lacks.
_DTYPES = {f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)}
_DTYPES |= {"BOOL": "?", "BF16": jnp.bfloat16}


class Weights(NamedTuple):
    """The content of a weight file."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_weights(path: AnyPath) -> Weights:
    """Read a weight file, every array as float32.

    Raises:
        UserError: if the file is missing or damaged, is not a weight file, or would run code.
    """
    require(path.is_file(), f"there is no file {path}")
    require(
        path.suffix in _READERS,
        f"{path}: weight files end in {', '.join(_READERS)}; rename the file if it is one of them",
    )
    tensors, metadata = _READERS[path.suffix](io.BytesIO(path.read_bytes()), path)
    require(bool(tensors), f"{path} holds no weights")
    for name, array in tensors.items():
        real = isinstance(array, np.ndarray) and (array.dtype.kind in "fiub" or array.dtype == jnp.bfloat16)
        require(real, f"{path}: {name} is not an array of real numbers")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which no model accepts
        return Weights({name: array.astype(np.float32) for name, array in tensors.items()}, metadata)


def _read_safetensors(file: BinaryIO, path: AnyPath) -> Weights:
    data = file.read()
    try:
        tensors = {
            name: np.frombuffer(stored["data"], _DTYPES[stored["dtype"]]).reshape(stored["shape"])
            for name, stored in safetensors.deserialize(data)
        }
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return Weights(tensors, header.get("__metadata__", {}))
    except Exception as error:  # a damaged file, or a dtype that NumPy lacks, raises errors of many types
        raise UserError(f"{path} is not a complete safetensors file of real numbers ({first_line(error)})") from None


def _read_npz(file: BinaryIO, path: AnyPath) -> Weights:
    """Read an archive of arrays; if some names begin with "param/", only those are weights."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            names = [name for name in archive.files if name.startswith("param/")] or archive.files
            return Weights({name.removeprefix("param/"): archive[name] for name in names}, {})
    except Exception as error:  # a damaged archive makes NumPy and zipfile raise errors of many types
        raise UserError(f"{path} is not a complete .npz archive of plain arrays ({first_line(error)})") from None


def _harmless_classes() -> list[Any]:
    """List the classes of stored training arguments, which are safe to unpickle: they only hold values."""
    functions: tuple[Any, ...] = (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # NumPy 1 and 2
    aliases = [(function, f"{module}.{function.__name__}") for function in functions for module in modules]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    # Python 3.13 renamed the module of paths; paths of another operating system become pure paths.
    paths = [
        (pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *paths, *aliases]


def _read_pth(file: BinaryIO, path: AnyPath) -> Weights:
    """Read a state dict saved by torch.save, alone or under a key of nested dicts, such as "model" or "state_dict".

    Torch's restricted unpickler builds tensors, plain containers and `_harmless_classes`; it rejects everything else
    before running any of it.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs torch to be read; {INSTALL_TORCH}, or convert it to .safetensors") from None
    try:
        with torch.serialization.safe_globals(_harmless_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they repeat the error
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # its message advises the user to disable this protection
        problem = "is not a complete torch file, or holds more than tensors and plain values"
        if rejected := re.search(r"GLOBAL (\S+)", str(error)):
            problem = f"would run {rejected[1]}, which no weights need"
        raise UserError(f"{path} {problem}; nothing was run") from None
    state = _choose_state_dict(_state_dicts(content, torch.Tensor), path)
    for name, value in state.items():
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_complex()
        require(plain, f"{path}: {name} is complex, sparse or without values")
    tensors = {str(name): value.detach().to(torch.float32).numpy() for name, value in state.items()}
    metadata = content.get("metadata", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    return Weights(tensors, metadata if strings else {})


def _state_dicts(content: Any, tensor: type, levels: int = 2) -> dict[str, dict[str, Any]]:  # noqa: ANN401
    """Return the tensors of each of the nested dicts that hold some, by dotted key, "" for the outermost."""
    if not isinstance(content, dict):
        return {}
    own = {str(name): value for name, value in content.items() if isinstance(value, tensor)}
    found = {"": own} if own else {}
    for key, value in content.items() if levels else ():
        inner = _state_dicts(value, tensor, levels - 1)
        found |= {f"{key}.{name}" if name else str(key): tensors for name, tensors in inner.items()}
    return found


def preference(key: str) -> int:
    """Return the rank of a dotted key among those of several state dicts in a file, by STATE_DICT_KEYS; 0 is best."""
    known = (STATE_DICT_KEYS.index(part) for part in key.split(".") if part in STATE_DICT_KEYS)
    return min(known, default=len(STATE_DICT_KEYS))


def _choose_state_dict(found: dict[str, dict[str, Any]], path: AnyPath) -> dict[str, Any]:
    """Return the preferred one of the state dicts with over half as many tensors as the largest; name the others."""
    require(bool(found), f"{path} holds no dict of tensors, neither at the top nor under a key such as 'model'")
    largest = max(map(len, found.values()))
    keys = [key for key, tensors in found.items() if 2 * len(tensors) > largest]
    chosen = min(keys, key=preference)  # the first of several of the same preference
    if others := [repr(key) if key else "no key" for key in keys if key != chosen]:
        say(f"{path}: reading the tensors under {chosen!r}, not those under {listing(others)}")
    return found[chosen]


_READERS = {".safetensors": _read_safetensors, ".pth": _read_pth, ".npz": _read_npz}


def check_output(path: Path) -> None:
    """Check that a weight file can be written to this path.

    Raises:
        UserError: naming the suffixes to choose from, or the package to install.
    """
    require(path.suffix in (".safetensors", ".pth"), f"--output: end {path} in .safetensors or .pth")
    require(not path.is_dir(), f"--output: {path} is a folder; name a file in it")
    if path.suffix == ".pth":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError(f"--output: to write {path}, {INSTALL_TORCH}, or end it in .safetensors") from None


def encode_weights(suffix: str, weights: Weights) -> bytes:
    """Encode a weight file: `.safetensors`, or `.pth` as a dict with "model" and "metadata"."""
    if suffix == ".safetensors":
        return safetensors.numpy.save(weights.tensors, weights.metadata)
    import torch

    state = {name: torch.from_numpy(array.copy()) for name, array in weights.tensors.items()}
    buffer = io.BytesIO()
    torch.save({"model": state, "metadata": weights.metadata}, buffer)
    return buffer.getvalue()
