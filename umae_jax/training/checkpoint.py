"""Checkpoints of a training run, DIR/checkpoints/STEP, written atomically in the background."""

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from umae_jax.errors import UserError, naming
from umae_jax.files import AnyPath, absolute, move_folder, write_atomic
from umae_jax.multihost import all_gather_json
from umae_jax.training.state import TrainState
from umae_jax.weights.stored_run import (
    BEST,
    DATA_FILE,
    FOLDER,
    OLD_BEST,
    best_checkpoint,
    checkpoints_in,
    first_whole,
    newest_first,
    quiet,
    read_arrays,
    read_data,
    summarize,
)

_UNREADABLE = "checkpoints_unreadable"
# Orbax splits a replicated array into one slice per device: hundreds of slices per save, for which a step waits.
# Smaller arrays, nearly all of them, are written whole, from one device.
_MIN_SLICED_BYTES = 2**20


def _fields(state: TrainState) -> dict[str, Any]:
    """Return the fields of a state by their names on disk, where `ema` is called "average"."""
    fields = state._asdict()
    ema = fields.pop("ema")
    return fields if ema is None else fields | {"average": ema}


class _Step(PreservationPolicy):
    """Preserve one step.

    Orbax's BestN does not fit: its metrics cannot be added to a checkpoint that exists, and a damaged metrics file
    stops the manager from opening the folder.
    """

    step: int | None = None

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one run: the newest, those of every `keep_every`-th step, and the best.

    Each holds the training state, the position in the data and, if it was the best when saved, its validation metric.

    Args:
        workdir: the run's directory.
        keep: number of newest checkpoints to keep.
        keep_every: also keep every checkpoint whose step is a multiple of it; 0: none.
        best_metric: metric whose highest value selects the best checkpoint.

    Raises:
        OSError: if the folder cannot be created.
    """

    def __init__(self, workdir: AnyPath, *, keep: int = 1, keep_every: int = 0, best_metric: str | None = None) -> None:
        self._workdir = absolute(workdir)
        self._folder = self._workdir / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._metric = best_metric
        self._restored: int | None = None  # step that the run continues from
        self._highest = float("-inf")  # value of the best metric so far
        self._writing = contextlib.ExitStack()
        self._best_step = _Step()
        policies = [LatestN(keep), self._best_step, *([EveryNSteps(keep_every)] if keep_every else [])]
        policy = AnyPreservationPolicy(policies)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        slice_bytes = _MIN_SLICED_BYTES // jax.device_count()
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=slice_bytes)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def any(self) -> bool:
        """Return whether there is a checkpoint."""
        return bool(newest_first(self._folder))

    def improves(self, metrics: dict[str, float]) -> bool:
        """Return whether the metrics are better than those of every checkpoint so far."""
        return self._metric is not None and metrics.get(self._metric, float("-inf")) > self._highest

    def save(self, step: int, state: TrainState, data: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Wait for the previous checkpoint, copy the state to the host, and write it in the background.

        The restored step is on disk already; `save` only adds its metrics.

        Args:
            step: number of completed steps.
            state: the training state.
            data: the position in the data, as JSON; "skipped_images" defaults to 0.
            metrics: of this step; only a new best value of `best_metric` is stored.

        Raises:
            UserError: if this or the previous checkpoint cannot be written.
        """
        content = {"skipped_images": 0, **data}
        if metrics and self._metric and self.improves(metrics):
            self._highest, self._best_step.step = metrics[self._metric], step
            content[BEST] = {self._metric: self._highest}
        if step != self._restored:
            self._writing.close()
            self._writing.enter_context(quiet())  # until the background thread has finished
            state_item, data_item = ocp.args.PyTreeSave(_fields(state)), ocp.args.JsonSave(content)
            items = ocp.args.Composite(state=state_item, data=data_item)
            self._guard(lambda: self._manager.save(step, args=items, force=True))
        elif BEST in content and jax.process_index() == 0:
            file = self._folder / str(step) / DATA_FILE
            self._guard(lambda: write_atomic(file, json.dumps(content).encode()))

    def wait(self) -> None:
        """Wait until all checkpoints are written; raise UserError if writing fails."""
        with self._writing:
            self._guard(self._manager.wait_until_finished)

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"could not write a checkpoint in {self._folder} ({summarize(error)}); "
                "make room or choose another --workdir, and start again to continue from the newest whole one"
            ) from error

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the state and the position in the data of the newest whole checkpoint, None if there is none.

        Newer ones that cannot be read are moved aside, with a warning.

        Args:
            abstract_state: shapes, dtypes and the shardings to restore to.

        Raises:
            UserError: if there are checkpoints but none can be read; nothing is moved then.
        """

        def read(path: epath.Path) -> tuple[TrainState, dict[str, Any]]:
            data = read_data(path)
            fields = _fields(abstract_state)
            counted = "skipped_images" in data  # earlier versions stored their number in the state
            arrays = read_arrays(path, fields if counted else fields | {"skipped_images": abstract_state.step})
            if not counted:
                data["skipped_images"] = int(arrays.pop("skipped_images"))
            if "average" in arrays:
                arrays["ema"] = arrays.pop("average")
            return TrainState(**arrays), data

        with naming("--workdir"):
            restored, broken = first_whole(newest_first(self._folder), read)
        if broken and restored is None:
            raise UserError(
                f"none of the checkpoints in {self._folder} can be read (the newest: {next(iter(broken.values()))}); "
                "choose another --workdir, or remove them to start anew"
            )
        self._restored, state_and_data = (int(restored[0].name), restored[1]) if restored else (None, None)
        if jax.process_index() == 0:
            aside = self._workdir / _UNREADABLE
            for path, why in broken.items():
                logging.warning("checkpoint %s cannot be read (%s); moving it to %s", path.name, why, aside)
                self._guard(functools.partial(move_folder, path, aside / path.name))
            for path in checkpoints_in(self._workdir / OLD_BEST):
                if int(path.name) > (self._restored or 0):  # the run will repeat it
                    path.rmtree()
        all_gather_json(None)  # wait for process 0
        self._manager.reload()
        if best := best_checkpoint(self._workdir):
            self._highest, self._best_step.step = best.value, int(best.folder.name)
        return state_and_data

    def close(self) -> None:
        """Wait until all checkpoints are written, and release the folder."""
        with self._writing:
            self._manager.close()
