"""The flags that every command shares, and errors that are one sentence.

Flags are parsed, and --help is answered, before JAX is imported. A command therefore defines its flags in a module that
does not import JAX, and imports the rest in its main function.
"""

import functools
import itertools
import logging as python_logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from umae_jax import process
from umae_jax.cluster_flags import ClusterFlags
from umae_jax.config import find_key, flat, load_config
from umae_jax.console import LogHandler, result, say
from umae_jax.errors import Preempted, UserError
from umae_jax.files import AnyPath, explain, locate
from umae_jax.help import HELP_FLAGS, command_help, explain_flag_error, keys_help, own_flags

T = TypeVar("T")


class _ConfigParser(flags.ArgumentParser):
    """Parses --config: a file, or the name of a bundled configuration."""

    def parse(self, argument: str) -> ConfigDict:
        return load_config(argument)

    def flag_type(self) -> str:
        return "configuration"


def define_config() -> flags.FlagHolder[ConfigDict | None]:
    """Define `--config FILE_OR_NAME` and its overrides `--config.KEY=VALUE`."""
    text = "A Python file, or a name below. --config NAME --help lists its keys, which --config.KEY=VALUE overrides."
    holder = config_flags.DEFINE_config_file("config", None, text)
    flags.FLAGS[holder.name].parser = _ConfigParser()
    return holder


def join(
    cluster: ClusterFlags, config: ConfigDict | None, workdir: AnyPath | None, *, preemption: bool = False
) -> None:
    """Connect to the other processes, if any, and check that all are about to do the same in the same directory.

    Call it before JAX creates its devices. `preemption` is that of `multihost.initialize`.

    Raises:
        UserError: if the processes cannot be connected, or differ.
    """
    import jax

    from umae_jax import multihost, startup

    startup.mark("imports")
    multihost.initialize(cluster, preemption=preemption)
    if not jax.distributed.is_initialized():
        return
    # All processes must find the same programs in their cache, or some wait for others to compile with them. On CPUs,
    # programs of several processes never have the same key twice. JAX opens its cache at the first compilation, below.
    startup.use_cache(workdir / startup.CACHE_FOLDER if workdir and jax.default_backend() != "cpu" else None)
    ignored = {"config", "workdir", *vars(cluster)}
    settings: dict[str, Any] = {"command": Path(sys.argv[0]).stem}
    settings |= {f"--{flag.name}": str(flag.value) for flag in own_flags().values() if flag.name not in ignored}
    if config is not None:
        settings |= {key: str(value) for key, value in flat(config).items()}
    multihost.check_agreement(settings, workdir)
    startup.mark("connecting the processes")


def required(flag: flags.FlagHolder[T | None], value: str) -> T:
    """Return the value of a flag that must be given.

    Raises:
        UserError: if it was not; it says what `value` to write, such as "the directory of a run".
    """
    if flag.value is None or flag.value == "":
        raise UserError(f"--{flag.name} is missing; write --{flag.name} with {value}")
    return flag.value


def read_config(flag: flags.FlagHolder[ConfigDict | None]) -> ConfigDict:
    """Return the configuration that --config and its overrides give, which must be given."""
    return required(flag, "a file or a name such as quickstart")


def _leave(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201 - the terminal
    if _is_distributed():
        from umae_jax import multihost  # imports JAX

        multihost.limit_exit()
    sys.exit(status)


def _split_none(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off the overrides `--config.KEY=None` of optional keys, which no parser of flags accepts.

    Returns:
        The other words of the command line, and the keys to set to None: those without a later override.
    """
    words: list[str] = []
    for word in argv:
        if word == "None" and re.fullmatch(r"--?config\.[\w.]+", words[-1] if words else ""):
            words[-1] += "=None"
        else:
            words.append(word)
    rest: list[str] = []
    keys: list[str] = []
    for index, word in enumerate(words):
        override = re.fullmatch(r"--?config\.([\w.]+)=None", word)
        known = find_key(override[1]) if override else None
        configured = any(re.match(r"--?config(=|$)", before) for before in rest)
        if override is None or known is None or not known.check.optional or not configured:
            rest.append(word)
        elif not any(re.match(rf"--?config\.{re.escape(override[1])}(=|$)", other) for other in words[index + 1 :]):
            keys.append(override[1])
    return rest, keys


def _parse(argv: Sequence[str], max_arguments: int) -> list[str]:
    """Parse flags and up to `max_arguments` arguments; leave with one sentence if something is wrong."""
    before_arguments = list(itertools.takewhile(lambda word: word != "--", argv))
    asks_help = not HELP_FLAGS.isdisjoint(before_arguments)
    words, unset = _split_none(argv)
    try:
        rest = flags.FLAGS([word for word in words if word not in HELP_FLAGS] if asks_help else words)
        if unset:
            config: Any = flags.FLAGS["config"].value
            config.update_from_flattened_dict(dict.fromkeys(unset))
    except (flags.Error, AttributeError, KeyError) as error:
        _leave(explain_flag_error(error, argv), 2)
    if asks_help:
        config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        result(command_help(sys.modules["__main__"].__doc__ or "") if config is None else keys_help(config))
        sys.exit()
    if len(rest) > 1 + max_arguments:
        _leave(f"unexpected argument {rest[1 + max_arguments]!r}; write options as --name value", 2)
    return rest


def run(main: Callable[..., None], *, arguments: int = 0, compiles: bool = True) -> None:
    """Parse the flags of a command and call it; turn errors that its user can fix into one sentence.

    The exit status is 2 after a UserError, 1 after any other error, 128 + signal after Preempted.

    Args:
        main: called with the arguments that are not flags.
        arguments: maximum number of these.
        compiles: whether it compiles programs, which are kept in the user's cache.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        python_logging.root.handlers = [LogHandler()]
        try:
            if compiles:
                from umae_jax import startup  # imports JAX

                startup.use_user_cache()
            main(*argv[1:])
        except Preempted as stopped:
            state = "everything is saved" if stopped.step else "there was nothing to save"
            say(f"{stopped}; {state}, the same command continues")
            sys.exit(128 + stopped.number)
        except Exception as error:
            if sentence := explain(error):
                _leave(sentence, 2 if isinstance(error, UserError) else 1)
            if not _is_distributed():
                raise
            traceback.print_exc()
            _leave("this process failed; if it lost a connection, another one failed first: see the other logs", 1)

    process.prepare()
    app.run(guarded, flags_parser=functools.partial(_parse, max_arguments=arguments))


def _is_distributed() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def run_training(command: str) -> None:
    """Parse the flags of a training command and run it."""
    config_flag = define_config()
    workdir_flag = flags.DEFINE_string("workdir", None, "Directory for checkpoints, metrics and everything else.")
    step_timeout = flags.DEFINE_float("step_timeout", 0, "Max seconds per training step; 0: no limit.", 0)
    cluster = ClusterFlags()

    def main() -> None:
        from umae_jax.tasks.command import train

        config = read_config(config_flag)
        workdir = locate(required(workdir_flag, "a directory for what the run produces"), "--workdir")
        join(cluster, config, workdir, preemption=True)
        if line := train(config, workdir, command, step_timeout.value or None):
            result(line)

    run(main)
