"""What every command shares: flags, and errors that are one sentence."""

import functools
import logging as python_logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from umae_jax import multihost, process, startup
from umae_jax.config import explain_failure, flat, load_config
from umae_jax.console import LogHandler, say
from umae_jax.errors import Preempted, UserError
from umae_jax.files import AnyPath, explain
from umae_jax.multihost import ClusterFlags

T = TypeVar("T")


class _ConfigParser(flags.ArgumentParser):
    """Parses --config: a file, or the name of a bundled configuration."""

    def parse(self, argument: str) -> ConfigDict:
        return load_config(argument)

    def flag_type(self) -> str:
        return "configuration"


def define_config() -> flags.FlagHolder[ConfigDict | None]:
    """Define `--config FILE_OR_NAME` and its overrides `--config.KEY=VALUE`."""
    holder = config_flags.DEFINE_config_file("config", None, "A Python file, or a bundled configuration: quickstart.")
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
    multihost.initialize(cluster, preemption=preemption)
    if not jax.distributed.is_initialized():
        return
    # All processes must find the same programs in their cache, or some wait for others to compile with them. On CPUs,
    # programs of several processes never have the same key twice. JAX opens its cache at the first compilation, below.
    startup.use_cache(workdir / startup.CACHE_FOLDER if workdir and jax.default_backend() != "cpu" else None)
    ignored = {"config", "workdir", *vars(cluster)}
    settings: dict[str, Any] = {"command": Path(sys.argv[0]).stem}
    for module, module_flags in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("umae_jax") or module == sys.argv[0]:
            chosen = [flag for flag in module_flags if flag.name.partition(".")[0] not in ignored]
            settings |= {f"--{flag.name}": str(flag.value) for flag in chosen}
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
    multihost.limit_exit()
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


def run(main: Callable[..., None], *, arguments: int = 0) -> None:
    """Parse the flags of a command and call it; turn errors that its user can fix into one sentence.

    The exit status is 2 after a UserError, 1 after any other error, 128 + signal after Preempted.

    Args:
        main: called with the arguments that are not flags.
        arguments: maximum number of these.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        python_logging.root.handlers = [LogHandler()]
        startup.mark("imports")
        startup.use_user_cache()
        try:
            main(*argv[1:])
        except Preempted as stopped:
            say(f"{stopped}; everything is saved, the same command continues")
            sys.exit(128 + stopped.number)
        except Exception as error:
            if sentence := explain(error):
                _leave(sentence, 2 if isinstance(error, UserError) else 1)
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            _leave("this process failed; if it lost a connection, another one failed first: see the other logs", 1)

    process.prepare()
    app.run(guarded, flags_parser=functools.partial(_parse, max_arguments=arguments))
