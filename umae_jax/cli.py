"""What every command shares: flags, and errors that are one sentence."""

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from umae_jax.errors import Interrupted, UserError

T = TypeVar("T")

# Failures of the file system that are the user's to mend, and say so themselves.
_FILE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Define `--config FILE` and its overrides `--config.KEY=VALUE`."""
    return config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)


def required(flag: flags.FlagHolder[T | None], what: str) -> T:
    """The value of a flag that must be given.

    Raises:
        UserError: saying what to write.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing; write --{flag.name} with {what}")
    return flag.value


def _leave(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal
    sys.exit(status)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parse flags; what is wrong with them, or with the configuration file, is said in one sentence."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            path = config_flags.get_config_filename(flags.FLAGS["config"])
            if not Path(path).is_file():
                _leave(f"--config: there is no file {path}; write the path of a file such as configs/quickstart.py", 2)
            flags.FLAGS.config.keys()
    except flags.Error as error:
        _leave(str(error), 2)
    except (AttributeError, KeyError) as error:
        _leave(
            f"--config: unknown key {str(error).strip(chr(34) + chr(39))}; the keys and what they mean stand in "
            "umae_jax/config.py",
            2,
        )
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        _leave(f"--config: {str(error).splitlines()[0]}", 2)
    if len(rest) > 1:
        _leave(f"unexpected argument {rest[1]!r}; every option is written --name value", 2)
    return rest


def run(main: Callable[[], None]) -> None:
    """Run a command: parse its flags, call it, and turn errors that its user can mend into one sentence."""

    def guarded(_: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except UserError as error:
            _leave(str(error), 2)
        except Interrupted as stopped:
            print(f"{stopped}; everything is saved, the same command continues", file=sys.stderr)  # noqa: T201
            sys.exit(128 + stopped.number)
        except OSError as error:
            if error.errno not in _FILE_ERRORS:
                raise
            _leave(f"{error.filename or 'a file'}: {error.strerror}; mend that or name another place", 1)

    app.run(guarded, flags_parser=_parse)
