"""Load configurations from Python files, and explain the keys that those get wrong."""

import difflib
import importlib.util
import os
import re
from pathlib import Path

from ml_collections import ConfigDict

from umae_jax.config.base import ENCODERS, METHODS, Sections, by_dotted_key
from umae_jax.config.common import COMMON
from umae_jax.errors import UserError, require

_PACKAGE = Path(__file__).parents[1]
# A wheel holds configs/ inside the package; a checkout holds it beside the package.
BUNDLED = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"
RENAMED = {
    "accumulate": "grad_accum_steps",
    "model.normalize_target": "model.norm_pix_loss",
    "model.reductions": "model.sr_ratios",
    "optimizer.average": "optimizer.ema_decay",
}
REMOVED = {"data.class_names": "class names are read from the training data"}


def bundled_configs() -> tuple[str, ...]:
    """Return the names of the bundled configurations."""
    return tuple(sorted(path.stem for path in BUNDLED.glob("*.py")))


def load_config(source: ConfigDict | str | os.PathLike[str]) -> ConfigDict:
    """Return a configuration.

    Args:
        source: a configuration, which is returned as it is; the path of a Python file whose `get_config()` returns
            one; or the name of a bundled file, such as "quickstart". "PATH:ARGUMENT" calls `get_config(ARGUMENT)`.

    Raises:
        UserError: if there is no such file or its `get_config()` fails.
    """
    if isinstance(source, ConfigDict):
        return source
    path, colon, argument = os.fspath(source).partition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        file = BUNDLED / f"{path}.py"
    bundled = ", ".join(bundled_configs())
    require(file.is_file(), f"there is no file {path} and no bundled configuration of that name; bundled are {bundled}")
    spec = importlib.util.spec_from_file_location("umae_jax_config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; write one such as configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        require(hasattr(module, "get_config"), "it must define get_config(); see configs/quickstart.py")
        config = module.get_config(*([argument] if colon else []))
    except Exception as error:  # user code
        raise UserError(f"{path}: {explain_failure(error)}") from error
    require(isinstance(config, ConfigDict), f"{path}: get_config() must return a default_config(), not {config!r}")
    return config.lock()


def _owners() -> dict[str, list[str]]:
    """Return the encoders or methods of every dotted key that only some configurations have."""
    parts: list[tuple[str, Sections]] = [(name, {"model": encoder.keys}) for name, encoder in ENCODERS.items()]
    owners: dict[str, list[str]] = {}
    for name, sections in parts + [(name, method.keys) for name, method in METHODS.items()]:
        for key in by_dotted_key(sections):
            owners.setdefault(key, []).append(name)
    return owners


def all_keys() -> set[str]:
    """Return the dotted keys of all encoders and methods."""
    return {*by_dotted_key(COMMON), *_owners()}


def explain_key(name: str) -> str:
    """Return a sentence about a key, dotted or its last part, that a configuration does not have."""

    def matches(key: str) -> bool:
        return key == name or key.rpartition(".")[2] == name

    for old, new in RENAMED.items():
        if matches(old):
            return f"{old} is now called {new}"
    for old, reason in REMOVED.items():
        if matches(old):
            return f"{old} no longer exists: {reason}"
    for key, names in _owners().items():
        if matches(key):
            return f"{key} is a key of {', '.join(names)} only"
    known = all_keys()
    near = difflib.get_close_matches(name, known | {key.rpartition(".")[2] for key in known}, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown key {name}; {hint}`python -m umae_jax.config` lists all keys"


def explain_failure(error: Exception) -> str:
    """Return one sentence about an error raised while the values of a configuration were set."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    # A ConfigDict raises 'Key "x" does not exist ...' where a key is set, and 'x' where it is read; a guess may follow.
    pattern = r"""\W*Key "(\w+)"|\W*(\w+)\W*(?:n?Did you mean .*)?$"""
    if isinstance(error, AttributeError | KeyError) and (key := re.match(pattern, text)):
        return explain_key(key[1] or key[2])
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
