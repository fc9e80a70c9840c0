"""What every command shares: flags, and errors that are one sentence."""

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from umae_jax import processes, startup
from umae_jax.config import explain_failure, flat, load_config
from umae_jax.errors import Preempted, UserError, require
from umae_jax.files import AnyPath, explain

T = TypeVar("T")


class _ConfigParser(flags.ArgumentParser):
    """Parses --config: a file, or the name of a bundled configuration."""

    def parse(self, argument: str) -> ConfigDict:
        return load_config(argument)

    def flag_type(self) -> str:
        return "configuration"


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Define `--config FILE_OR_NAME` and its overrides `--config.KEY=VALUE`."""
    holder = config_flags.DEFINE_config_file("config", None, "A Python file, or a bundled configuration: quickstart.")
    flags.FLAGS[holder.name].parser = _ConfigParser()
    return holder


class ProcessFlags(NamedTuple):
    """The flags by which processes find each other."""

    coordinator: flags.FlagHolder[str | None]
    processes: flags.FlagHolder[int | None]
    process: flags.FlagHolder[int | None]
    wait: flags.FlagHolder[int]
    lost_after: flags.FlagHolder[float]


def define_processes() -> ProcessFlags:
    """Define the flags of a command that several processes may run together."""
    return ProcessFlags(
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; Cloud TPU and SLURM tell it by themselves."),
        flags.DEFINE_integer("processes", None, "How many there are; 1: alone, whatever Cloud TPU or SLURM tell."),
        flags.DEFINE_integer("process", None, "Which one this is, from 0."),
        flags.DEFINE_integer("wait", 300, "Seconds to wait for the other processes to start.", lower_bound=1),
        flags.DEFINE_float("lost_after", 60.0, "Seconds of silence after which a process is gone.", lower_bound=1.0),
    )


def join(given: ProcessFlags, config: ConfigDict | None, workdir: AnyPath | None) -> None:
    """Meet the other processes, if there are any; to be called before JAX is asked for its devices.

    Args:
        given: the flags.
        config: must be the same in all.
        workdir: must be seen by all.

    Raises:
        UserError: if they do not come, or are not about to do the same.
    """
    place = processes.find_place(given.coordinator.value, given.processes.value, given.process.value, given.wait.value)
    own = {"config", "workdir", *(flag.name for flag in given)}
    doing: dict[str, Any] = {"command": Path(sys.argv[0]).stem}
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("umae_jax") or module == sys.argv[0]:
            doing |= {f"--{flag.name}": str(flag.value) for flag in found if flag.name.partition(".")[0] not in own}
    doing |= {} if config is None else {key: str(value) for key, value in flat(config).items()}
    processes.join(
        place, doing, workdir=workdir, wait=given.wait.value, silence=given.lost_after.value, say=_print_error
    )
    if processes.joined():
        # All read what process 0 writes, or some would wait for it to compile with them what it has read. On processors
        # the programs of several processes have another key each time.
        shared = None if workdir is None or jax.default_backend() == "cpu" else workdir / startup.CACHE_FOLDER
        startup.use_cache(shared)
        startup.mark("meeting the others")


def required(flag: flags.FlagHolder[T | None], value: str) -> T:
    """Return the value of a flag that must be given.

    Args:
        flag: the flag.
        value: its meaning, for the error message, such as "the directory of a run".

    Raises:
        UserError: if it was not given.
    """
    if flag.value is None or flag.value == "":
        raise UserError(f"--{flag.name} is missing; write --{flag.name} with {value}")
    return flag.value


def say(line: str) -> None:
    """Tell the user something on the terminal, once for all processes."""
    if processes.is_first():
        _print_error(line)


def _print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal


def result(line: object) -> None:
    """Give the user what the command is for, on standard output, once for all processes."""
    if processes.is_first():
        print(line, flush=True)  # noqa: T201 - this is the terminal


def _leave(message: str, status: int) -> NoReturn:
    if others := processes.joined():
        others.fail(message, status)
    _print_error(f"error: {message}")
    sys.exit(status)


def _parse(argv: Sequence[str], max_arguments: int) -> list[str]:
    """Parse flags and up to `max_arguments` arguments; leave with one sentence if something is wrong."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _leave(str(error), 2)
    except (AttributeError, KeyError) as error:  # an override of a key that the configuration does not have
        _leave(f"--config: {explain_failure(error)}", 2)
    if len(rest) > 1 + max_arguments:
        _leave(f"unexpected argument {rest[1 + max_arguments]!r}; write options as --name value", 2)
    return rest


def read_config(flag: flags.FlagHolder[ConfigDict]) -> ConfigDict:
    """Return the configuration that --config and its overrides give.

    Raises:
        UserError: if --config was not given.
    """
    require(bool(flag.present), "--config is missing; write --config with a file or a name such as quickstart")
    return flag.value


def _mendable(error: Exception) -> tuple[str, int] | None:
    """The sentence and the exit status of an error that the user can mend."""
    sentence = explain(error)
    return None if sentence is None else (sentence, 2 if isinstance(error, UserError) else 1)


def run(main: Callable[..., None], *, arguments: int = 0) -> None:
    """Run a command: parse its flags, call it, and turn errors that its user can mend into one sentence.

    Args:
        main: called with what was written beside the flags.
        arguments: how many of these there may be.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        startup.mark("imports")
        startup.use_user_cache()
        status = 0
        try:
            main(*argv[1:])
        except Preempted as stopped:
            say(f"{stopped}; everything is saved, the same command continues")
            status = 128 + stopped.number
        except processes.RemoteError:
            sys.exit(2)
        except KeyboardInterrupt:
            if others := processes.joined():
                others.fail("stopped by Ctrl-C", 130)
            sys.exit(130)
        except Exception as error:
            mendable, others = _mendable(error), processes.joined()
            if others and (mendable is None or isinstance(error.__cause__, RuntimeError)):
                others.await_news()  # where another is gone, this is but the echo
            if mendable:
                _leave(*mendable)
            if others:
                traceback.print_exc()
                others.fail(f"{type(error).__name__}: {error}", 1)
            raise
        if others := processes.joined():
            others.leave()
        sys.exit(status)

    app.run(guarded, flags_parser=functools.partial(_parse, max_arguments=arguments))
