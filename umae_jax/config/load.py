"""Load configurations from Python files, and explain wrong keys in them."""

import ast
import difflib
import importlib.util
import os
import re
from pathlib import Path

from ml_collections import ConfigDict

from umae_jax.config.base import ENCODERS, METHODS, Encoder, Key, Method
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


def describe_bundled() -> dict[str, str]:
    """Return the first line of the docstring of every bundled configuration, without references, by name."""
    trees = {name: ast.parse((BUNDLED / f"{name}.py").read_text()) for name in bundled_configs()}
    lines = {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items()}
    return {name: re.sub(r" \([^()]*SPEC[^()]*\)", "", line) for name, line in lines.items()}


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
    """Return the names of the encoders or methods that have a key, for every key that not all configurations have."""
    parts: dict[str, Encoder | Method] = {**ENCODERS, **METHODS}
    owners: dict[str, list[str]] = {}
    for name, part in parts.items():
        for key in part.keys:
            owners.setdefault(key, []).append(name)
    return owners


def find_key(name: str) -> Key | None:
    """Return the key of this dotted name of any encoder or method."""
    tables = [COMMON, *(encoder.keys for encoder in ENCODERS.values()), *(method.keys for method in METHODS.values())]
    return next((keys[name] for keys in tables if name in keys), None)


def all_keys() -> set[str]:
    """Return the dotted keys of all encoders and methods."""
    return {*COMMON, *_owners()}


def explain_key(name: str, prefix: str = "") -> str:
    """Explain in one sentence why a configuration lacks a key.

    Args:
        name: its dotted name or one part of it.
        prefix: what the user wrote before the name: "--config." on the command line.
    """
    explanations = {
        **{old: f"{old} is now called {new}" for old, new in RENAMED.items()},
        **{old: f"{old} no longer exists: {reason}" for old, reason in REMOVED.items()},
        **{key: f"{key} is a key of {', '.join(names)} only" for key, names in _owners().items()},
    }
    for key, explanation in explanations.items():
        if name in (key, key.rpartition(".")[2]):
            return explanation
    known = sorted(all_keys())
    names = {
        **{key.rpartition(".")[2]: key for key in known},
        **{key.partition(".")[0]: key.partition(".")[0] for key in known if "." in key},
        **{key: key for key in known},
    }
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {prefix}{names[near[0]]}?" if near else "`python -m umae_jax.config` lists all keys"
    return f"unknown key {prefix}{name}; {hint}"


def missing_key(error: Exception) -> str | None:
    """Return the key that a ConfigDict does not have, without its section, if that is what the error says."""
    # Setting an unknown key raises 'Key "x" does not exist ...', reading it 'x', perhaps with a guess.
    pattern = r"""\W*Key "(\w+)"|\W*(\w+)\W*(?:n?Did you mean .*)?$"""
    match = re.match(pattern, str(error)) if isinstance(error, AttributeError | KeyError) else None
    return (match[1] or match[2]) if match else None


def explain_failure(error: Exception) -> str:
    """Explain in one sentence an error that was raised while a configuration was built or changed."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if key := missing_key(error):
        return explain_key(key)
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
