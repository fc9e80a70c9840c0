"""Errors that a user can fix, and exceptions that end a run early."""

import contextlib
import reprlib
import signal
import unicodedata
from collections.abc import Iterator, Sequence

_REPR = reprlib.Repr()
_REPR.maxtuple, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 8, 60, 60, 60


class UserError(ValueError):
    """A wrong configuration, path or file.

    The message is one sentence: the fault, its place, and what to write instead. The commands print it without a
    traceback and exit with status 2.
    """


class MissingDataError(UserError):
    """Data that do not exist here, but may elsewhere: a plan assumes their size.

    Attributes:
        key: configuration key that names them.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class Preempted(Exception):  # noqa: N818 - not an error
    """A signal stopped a run, after its state was saved.

    Attributes:
        number: signal number.
        step: the saved step.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.number = number
        self.step = step


class PreemptionRequested(Exception):  # noqa: N818 - not an error
    """A signal asked the run to stop during a long evaluation, which was abandoned."""


def nearest_multiples(value: int, multiple: int) -> str:
    """Return the positive multiples below and above `value`, for an error message: "192 or 256"."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below > 0 else str(multiple)


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Begin the messages of UserErrors raised inside with the flag or key whose value is wrong."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error.__cause__


def shorten(value: object) -> str:
    """Return the `repr` of a value for an error message, with the middle of long ones left out."""
    return _REPR.repr(value)


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` names, for an error message: "a, b and 3 more"."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def printable(name: str) -> str:
    r"""Return a file's name as it may leave the program, with escapes for what is no text: "\xff.jpg".

    A name that is not UTF-8 cannot be printed or stored, and a control character would break a line or table.
    """
    return name if name.isprintable() else "".join(map(_escape, name))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # in Python, a byte of a name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    is_text = unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
    return character if is_text else character.encode("unicode_escape").decode()
