"""How a command ends before its end: an error that its user can mend, or a signal."""

import signal
from collections.abc import Sequence


class UserError(ValueError):
    """A wrong configuration, path or file; its message is one sentence: what is wrong, where, what to write instead.

    The commands print it without a traceback and leave with status 2.
    """


class Preempted(Exception):  # noqa: N818 - not an error
    """A run was stopped by a signal, after its state was saved.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.number = number


def nearest_multiples(value: int, multiple: int) -> str:
    """The multiples of `multiple` around `value`, for an error message: "192 or 256", "64" below the first."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below > 0 else str(multiple)


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def listing(names: Sequence[str], most: int = 5) -> str:
    """Names for an error message, the first few of them."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
