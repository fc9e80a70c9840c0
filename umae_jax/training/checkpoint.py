"""Checkpoints: everything a run continues from, written while it goes on, whole or not at all."""

import functools
import logging as std_logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging

from umae_jax.errors import UserError
from umae_jax.files import AnyPath, explain, move_folder, of_bucket
from umae_jax.multihost import all_gather_json, broadcast_json
from umae_jax.training.step import TrainState

Found = TypeVar("Found")

FOLDER = "checkpoints"
BEST = "checkpoints_best"
UNREADABLE = "unreadable"  # goes behind the folder's name
# Orbax cuts an array that several devices hold into a part for each, of whatever host. That is hundreds of slices a
# save, which a step waits for; arrays of fewer bytes, nearly all, go whole, from one device.
_WHOLE = 2**20


@functools.cache
def _say_failures_once() -> None:
    """Keep off the terminal what the libraries print of a failure that they raise as well, and that is told here.

    When one array of a checkpoint cannot be read or written, Orbax logs the traceback, and the callbacks of all the
    others still pending find their event loop closed, and each prints one as unraisable or in asyncio's log; and those
    not yet begun are told to have been forgotten.
    """
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    logging.get_absl_logger().addFilter(_not_from_orbax)
    inherited = sys.unraisablehook

    def not_of_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            inherited(unraisable)

    sys.unraisablehook = not_of_closed_loops


def _not_from_orbax(record: std_logging.LogRecord) -> bool:
    return not record.pathname.startswith(os.path.dirname(ocp.__file__))


def _reason(error: BaseException) -> str:
    """What went wrong, for people: the system's own words if they are in the message, else its beginning."""
    if system := re.search(r"([^:]+?) \[os_error_code", str(error)):
        return system[1].strip()
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def _warn(*message: object) -> None:
    if jax.process_index() == 0:
        logging.warning(*message)


def _read_alone(handler: Callable[..., Any], path: AnyPath, wanted: Any) -> Any:  # noqa: ANN401 - Orbax's arguments
    """Read an item without waiting for other processes: one that cannot read leaves the others waiting else."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    with ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(path, args=wanted)


def newest_step(workdir: AnyPath) -> int:
    """The step of a run's newest whole checkpoint, 0 if there is none."""
    return max(ocp.path.step.checkpoint_steps(workdir / FOLDER), default=0)


def _fields(state: TrainState) -> dict[str, Any]:
    """What there is of a state, by name: a field that it has not is not in the checkpoint either."""
    return {name: value for name, value in state._asdict().items() if value is not None}


class Checkpoints:
    """The checkpoints of one working directory, DIR/checkpoints/STEP.

    Beside the state lies the state of the data, {"samples": how many have been seen}: all that the stream of samples
    depends on (see `data/loader.py`), so that a run may go on with other devices or processes.

    Args:
        workdir: the directory.
        folder: of its checkpoints.
        keep: the newest so many are kept; None keeps all.
        keep_every: and each that this number of steps divides; 0 for none.
        read_only: for looking at another's run: nothing is created, cleaned up or moved.

    Raises:
        OSError: if the directory cannot be made.
    """

    def __init__(
        self,
        workdir: AnyPath,
        *,
        folder: str = FOLDER,
        keep: int | None = 1,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        _say_failures_once()
        self._folder = workdir.absolute() / folder if isinstance(workdir, Path) else workdir / folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
        least = _WHOLE // jax.device_count()  # of a part
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=least)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        # Not by StandardSave, which takes no registry; StandardRestore reads what either wrote.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def any(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(self._steps())

    def _steps(self) -> list[int]:
        """From the oldest to the newest, as process 0 sees them: a shared file system may show others less."""
        return broadcast_json(sorted(self._manager.all_steps()))

    def save(self, step: int, state: TrainState, samples: int, **notes: float) -> None:
        """Copy the state to the host and write it in the background; waits for the one before to be written.

        Args:
            step: of the state.
            state: what to save.
            samples: seen so far.
            notes: more to write beside the state, for `note`.

        Raises:
            UserError: if this or the one before could not be written.
        """
        data = ocp.args.JsonSave({"samples": samples, **notes})
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(_fields(state)), data=data)
        self._guard(lambda: self._manager.save(step, args=items, force=True))

    def wait(self) -> None:
        """Wait until everything has been written.

        Raises:
            UserError: if it could not be.
        """
        self._guard(self._manager.wait_until_finished)

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"could not write a checkpoint in {self._folder} ({_reason(error)}); "
                "make room or choose another --workdir, and start again to continue from the newest whole one"
            ) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """The newest whole checkpoint, on the shardings of `abstract`: the state and how many samples it has seen.

        Newer ones that cannot be read are moved aside, with a warning. None if there is no checkpoint.

        Raises:
            UserError: if there are checkpoints, but none can be read; nothing is moved then.
        """

        def read(step: int) -> tuple[TrainState, int]:
            wanted = ocp.args.StandardRestore(_fields(abstract))
            fields = _read_alone(ocp.StandardCheckpointHandler, self._folder / str(step) / "state", wanted)
            return TrainState(**fields), int(self._data(step)["samples"])

        found, broken = self._newest_whole(read)
        if found is None and broken:
            raise UserError(
                f"none of the checkpoints in {self._folder} can be read (the newest: {broken[max(broken)]}); "
                "choose another --workdir, or remove them to start anew"
            )
        self._set_aside(broken)
        return found

    def forget(self, *, after: int, before: int) -> None:
        """Delete the checkpoints of later steps than `after`, and of those up to `before` all but the newest."""
        steps = self._steps()
        for step in steps:
            if step > after or (step <= before and step != max(other for other in steps if other <= before)):
                self._manager.delete(step)

    def note(self, name: str) -> float | None:
        """What was noted under this name beside the newest whole checkpoint."""

        def read(step: int) -> float | None:
            return self._data(step).get(name)

        return self._newest_whole(read)[0]

    def restore_part(self, name: str, abstract: Any) -> tuple[Any, int] | None:  # noqa: ANN401 - any pytree
        """One field of the newest whole checkpoint's state, and its step. Leaves the directory as it is."""

        def read(step: int) -> tuple[Any, int]:
            part = ocp.args.PyTreeRestore(
                {name: abstract},
                restore_args=ocp.checkpoint_utils.construct_restore_args({name: abstract}),
                partial_restore=True,
            )
            return _read_alone(ocp.PyTreeCheckpointHandler, self._folder / str(step) / "state", part)[name], step

        found, broken = self._newest_whole(read)
        for step, reason in broken.items():
            _warn("checkpoint %d cannot be read (%s); trying the one before", step, reason)
        return found

    def _data(self, step: int) -> dict[str, Any]:
        """What lies beside a state."""
        return _read_alone(ocp.JsonCheckpointHandler, self._folder / str(step) / "data", ocp.args.JsonRestore())

    def _newest_whole(self, read: Callable[[int], Found]) -> tuple[Found | None, dict[int, str]]:
        """What `read` makes of the newest step that it can read, and why it could not read the newer ones."""
        broken: dict[int, str] = {}
        for step in reversed(self._steps()):
            found = None
            try:
                found = read(step)
            except Exception as error:  # whatever a broken file makes the libraries raise
                if of_bucket(error) and not isinstance(error, FileNotFoundError):  # nothing is broken
                    raise UserError(f"{self._folder}: {explain(error)}") from error
                broken[step] = _reason(error)
            if not (reasons := [reason for reason in all_gather_json(broken.get(step)) if reason]):
                return found, broken
            broken[step] = reasons[0]
        return None, broken

    def _set_aside(self, broken: dict[int, str]) -> None:
        """Move checkpoints out of the way of those to come."""
        aside = self._folder.with_name(f"{self._folder.name}_{UNREADABLE}")
        for step, reason in broken.items():
            _warn("checkpoint %d cannot be read (%s); moved it to %s", step, reason, aside)
            if jax.process_index() == 0:
                self._guard(functools.partial(move_folder, self._folder / str(step), aside / str(step)))
        if broken:
            all_gather_json(None)  # they have been moved
            self._manager.reload()

    def close(self) -> None:
        """Let go of the directory; waits for what is being written."""
        self._manager.close()
