"""How long it takes from a command to its first step, and what with."""

import time

import umae_jax

_parts: dict[str, float] = {}
_last = umae_jax.STARTED


def spent(on: str) -> None:
    """The time since the last call, or since the command was given, went on this."""
    global _last
    now = time.monotonic()
    _parts[on] = _parts.get(on, 0.0) + now - _last
    _last = now


def summary() -> str:
    """All of it as a sentence; what took no half second is left out."""
    parts = ", ".join(f"{on} {seconds:.0f} s" for on, seconds in _parts.items() if seconds >= 0.5)
    return f"first step {sum(_parts.values()):.0f} s after the start: {parts}"
