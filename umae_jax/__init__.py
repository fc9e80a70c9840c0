"""UM-MAE: masked pre-training of pyramid vision transformers, in JAX."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umae_jax.features import load_encoder

__version__ = "0.1.0"
STARTED = time.monotonic()  # before anything else is imported; see umae_jax/beginning.py
__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever is asked for
    """Import on first use: the commands, and the workers that read images, start without it."""
    if name == "load_encoder":
        from umae_jax.features import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
