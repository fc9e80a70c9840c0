"""The one kind of error that a user causes and can mend."""

from collections.abc import Sequence


class UserError(ValueError):
    """A wrong configuration, path or file; its message is one sentence: what is wrong, where, what to write instead.

    The commands print it without a traceback and leave with status 2.
    """


def nearest_multiples(value: int, multiple: int) -> str:
    """The multiples of `multiple` around `value`, for an error message: "192 or 256", "64" below the first."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def listing(names: Sequence[str], most: int = 5) -> str:
    """Names for an error message, the first few of them."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
