"""Explain keys that a configuration does not have: renamed, removed, of another encoder or method, or misspelt."""

import difflib
import re

from umae_jax.config.base import ENCODERS, METHODS, by_dotted_key
from umae_jax.config.common import COMMON
from umae_jax.errors import UserError

RENAMED = {
    "accumulate": "grad_accum_steps",
    "model.normalize_target": "model.norm_pix_loss",
    "model.reductions": "model.sr_ratios",
    "optimizer.average": "optimizer.ema_decay",
}
REMOVED = {"data.class_names": "class names are read from the training data"}


def owners() -> dict[str, list[str]]:
    """Return the encoders or methods of every dotted key that only some configurations have."""
    names: dict[str, list[str]] = {}
    for name, encoder in ENCODERS.items():
        for key in encoder.keys:
            names.setdefault(f"model.{key}", []).append(name)
    for name, method in METHODS.items():
        for key in by_dotted_key(method.keys):
            names.setdefault(key, []).append(name)
    return names


def all_keys() -> set[str]:
    """Return the dotted keys of all encoders and methods."""
    return {*by_dotted_key(COMMON), *owners()}


def explain_key(name: str) -> str:
    """Return a sentence about a key that a configuration does not have.

    Args:
        name: the dotted key, or its last part.
    """

    def matches(key: str) -> bool:
        return key == name or key.rpartition(".")[2] == name

    for old, new in RENAMED.items():
        if matches(old):
            return f"{old} is now called {new}"
    for old, reason in REMOVED.items():
        if matches(old):
            return f"{old} no longer exists: {reason}"
    for key, names in owners().items():
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
    # A ConfigDict raises 'Key "x" does not exist ...' where a key is set, and 'x' where it is read.
    if isinstance(error, AttributeError | KeyError) and (key := re.match(r"""\W*Key "(\w+)"|\W*(\w+)\W*$""", text)):
        return explain_key(key[1] or key[2])
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
