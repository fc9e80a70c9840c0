"""UM-MAE: masked pre-training of pyramid vision transformers, in JAX.

"SPEC n" in docstrings is section n of docs/method.md (in a wheel umae_jax/docs/method.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

from umae_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from umae_jax.api import default_config, detect, evaluate, finetune, list_models, pretrain
    from umae_jax.features import load_encoder

__all__ = ["default_config", "detect", "evaluate", "finetune", "list_models", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - one of the functions of the API
    """Import the API on first use; commands, and the workers that read images, start faster without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("umae_jax.features" if name == "load_encoder" else "umae_jax.api")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
