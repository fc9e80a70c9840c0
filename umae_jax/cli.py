"""What every command shares: flags, and errors that are one sentence."""

import errno
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from umae_jax.errors import Interrupted, UserError, require

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
    if flag.value is None or flag.value == "":
        raise UserError(f"--{flag.name} is missing; write --{flag.name} with {what}")
    return flag.value


def say(line: str) -> None:
    """Tell the user something on the terminal."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal


def _leave(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal
    sys.exit(status)


def _parse(argv: Sequence[str], most: int) -> list[str]:
    """Parse flags and at most so many arguments; what is wrong, with the configuration file too, is one sentence."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _leave(str(error), 2)
    except FileNotFoundError as error:
        _leave(f"--config: there is no file {error.filename}; write the path of one such as configs/quickstart.py", 2)
    except AttributeError as error:
        if "get_config" in str(error):
            _leave("--config: the file must define get_config(); see configs/quickstart.py", 2)
        _leave(f"--config: unknown key {error}; umae_jax/config.py lists the keys and says what they mean", 2)
    except Exception as error:  # the file is a program of the user's and may raise anything
        _leave(f"--config: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 2)
    if len(rest) > 1 + most:
        _leave(f"unexpected argument {rest[1 + most]!r}; every option is written --name value", 2)
    return rest


def read_config(flag: flags.FlagHolder[ConfigDict]) -> ConfigDict:
    """The configuration that the flags give.

    Raises:
        UserError: if there is none.
    """
    holder = flags.FLAGS[flag.name]
    require(bool(holder.present), "--config is missing; write --config with a file such as configs/quickstart.py")
    path = config_flags.get_config_filename(holder)
    if not Path(path).is_file():
        path = path.rpartition(":")[0] or path  # behind the colon stands what its get_config() is called with
    require(Path(path).is_file(), f"--config: there is no file {path}; write one such as configs/quickstart.py")
    config = flag.value
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {path} must return a changed default_config(), not {config!r}")
    return config


def run(main: Callable[..., None], *, arguments: int = 0) -> None:
    """Run a command: parse its flags, call it, and turn errors that its user can mend into one sentence.

    Args:
        main: called with what was written beside the flags.
        arguments: how many of these there may be.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            main(*argv[1:])
        except UserError as error:
            _leave(str(error), 2)
        except Interrupted as stopped:
            print(f"{stopped}; everything is saved, the same command continues", file=sys.stderr)  # noqa: T201
            sys.exit(128 + stopped.number)
        except KeyboardInterrupt:
            sys.exit(130)
        except OSError as error:
            if error.errno not in _FILE_ERRORS:
                raise
            _leave(f"{error.filename or 'a file'}: {error.strerror}; mend that or name another place", 1)

    app.run(guarded, flags_parser=functools.partial(_parse, most=arguments))
