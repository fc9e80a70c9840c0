"""What every command shares: flags, and errors that are one sentence."""

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from umae_jax import beginning, compilation_cache, multihost
from umae_jax.config import flat
from umae_jax.errors import Preempted, UserError, require
from umae_jax.files import AnyPath, explain
from umae_jax.multihost import ClusterFlags

T = TypeVar("T")


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Define `--config FILE` and its overrides `--config.KEY=VALUE`."""
    return config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)


def join(cluster: ClusterFlags, config: ConfigDict | None, workdir: AnyPath | None) -> None:
    """Connect to the other processes, if any, and check that all are about to do the same.

    Call it before JAX creates its devices.

    Args:
        cluster: flags of `multihost.define_flags`.
        config: must be equal on all processes.
        workdir: must be shared by all processes.

    Raises:
        UserError: if the processes cannot be connected, or differ.
    """
    multihost.initialize(cluster)
    if not multihost.is_connected():
        return
    ignored = {"config", "workdir", *(flag.name for flag in cluster)}
    settings: dict[str, Any] = {"command": Path(sys.argv[0]).stem}
    for module, module_flags in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("umae_jax") or module == sys.argv[0]:
            chosen = [flag for flag in module_flags if flag.name.partition(".")[0] not in ignored]
            settings |= {f"--{flag.name}": str(flag.value) for flag in chosen}
    settings |= {} if config is None else {key: str(value) for key, value in flat(config).items()}
    multihost.check_agreement(settings, workdir)
    # All processes must find the same programs in their cache, or some wait for others to compile with them. On CPUs,
    # programs of several processes never have the same key twice.
    shared = None if workdir is None or jax.default_backend() == "cpu" else workdir / compilation_cache.FOLDER
    compilation_cache.keep(shared)
    beginning.spent("meeting the others")


def required(flag: flags.FlagHolder[T | None], what: str) -> T:
    """The value of a flag that must be given.

    Raises:
        UserError: saying what to write.
    """
    if flag.value is None or flag.value == "":
        raise UserError(f"--{flag.name} is missing; write --{flag.name} with {what}")
    return flag.value


def say(line: str) -> None:
    """Print a line for the user on the terminal, from process 0 only."""
    if multihost.is_primary():
        _print_error(line)


def _print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the terminal


def result(line: object) -> None:
    """Print the result of the command on standard output, from process 0 only."""
    if multihost.is_primary():
        print(line, flush=True)  # noqa: T201 - the terminal


def _leave(message: str, status: int) -> NoReturn:
    _print_error(f"error: {message}")
    multihost.limit_exit()
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
    """Parse the flags of a command and call it; turn errors that its user can fix into one sentence.

    The exit status is 2 after a UserError, 1 after any other error, 128 + signal after Preempted.

    Args:
        main: called with the arguments that are not flags.
        arguments: maximum number of these.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        beginning.spent("imports")
        compilation_cache.keep_for_user()
        try:
            main(*argv[1:])
        except Preempted as stopped:
            say(f"{stopped}; everything is saved, the same command continues")
            sys.exit(128 + stopped.number)
        except KeyboardInterrupt:
            multihost.limit_exit()
            sys.exit(130)
        except Exception as error:
            if sentence := explain(error):
                _leave(sentence, 2 if isinstance(error, UserError) else 1)
            if not multihost.is_connected():
                raise
            traceback.print_exc()
            _leave("this process failed; if it lost a connection, another one failed first: see the other logs", 1)

    app.run(guarded, flags_parser=functools.partial(_parse, most=arguments))
