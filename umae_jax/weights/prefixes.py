"""Prefixes of tensor names: those that DistributedDataParallel, torch.compile or a surrounding model add."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from umae_jax.console import say
from umae_jax.errors import listing
from umae_jax.weights.files import preference
from umae_jax.weights.huggingface import LAYOUTS

# The patch embedding, which every encoder has, in the reference and in transformers; the longest name first.
_PATCHES = "patch_embed.proj"
_ANCHORS = [f"{name}.weight" for name in (_PATCHES, *(names[_PATCHES] for names in LAYOUTS.values()))]
_ANCHORS.sort(key=len, reverse=True)
# A wrapper of the whole model adds a prefix, one of a part of it stands inside the names.
_INNER_WRAPPER = re.compile(r"(?<=\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def remove_prefix(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Remove from all names the prefix of the patch embedding, and wrappers; print a line that says so.

    Tensors without that prefix are not part of the model, but of an optimizer or a second model: they are left out.

    Args:
        tensors: the state dict.
        name: the file, for the line.
    """
    wrappers = {wrapper for key in tensors for wrapper in _INNER_WRAPPER.findall(key)}
    unwrapped = {_INNER_WRAPPER.sub("", key): array for key, array in tensors.items()}
    if len(unwrapped) < len(tensors):  # two names would become one
        wrappers, unwrapped = set(), dict(tensors)
    prefix = _choose_prefix(unwrapped)
    kept = {key.removeprefix(prefix): array for key, array in unwrapped.items() if key.startswith(prefix)}
    if removed := [repr(text) for text in (prefix, *sorted(wrappers)) if text]:
        others = [key for key in unwrapped if not key.startswith(prefix)]
        left_out = f"; left out {len(others)} tensors: {listing(others)}" if others else ""
        say(f"{name}: removed {listing(removed)} from the names of {len(kept)} tensors{left_out}")
    return kept


def _choose_prefix(names: Iterable[str]) -> str:
    """Return the prefix of the patch embedding; of several, the preferred one of those with about the most names."""
    prefixes = {prefix for key in names if (prefix := _prefix(key)) is not None}
    if "" in prefixes or not prefixes:
        return ""
    counts = {prefix: sum(key.startswith(prefix) for key in names) for prefix in prefixes}
    candidates = (prefix for prefix in counts if 2 * counts[prefix] >= max(counts.values()))
    return min(candidates, key=lambda prefix: (preference(prefix[:-1]), prefix.count("."), prefix))


def _prefix(key: str) -> str | None:
    """Return the part of a name before that of a patch embedding; None for other tensors."""
    return next((key.removesuffix(anchor) for anchor in _ANCHORS if key.endswith(anchor)), None)
