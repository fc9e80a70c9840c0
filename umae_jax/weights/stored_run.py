"""A run's directory: its configuration, class names and checkpoints, read without the training code.

DIR/config.json, DIR/classes.json (classifiers)
DIR/checkpoints/STEP/state      arrays: step, params, optimizer, bad_steps, skipped_updates, average (if kept)
DIR/checkpoints/STEP/data       JSON: the position in the data; "best": the validation metric, if it was the best
DIR/checkpoints_best/STEP       of runs of the first version: the best checkpoint; its data holds the metric
"""

import asyncio
import contextlib
import json
import logging as std_logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from umae_jax.config import CONFIG_FILE, old_class_names, read_config
from umae_jax.errors import UserError, require
from umae_jax.files import AnyPath, absolute, explain, from_bucket
from umae_jax.models.build import build_model
from umae_jax.multihost import all_gather_json, broadcast_json

T = TypeVar("T")

FOLDER = "checkpoints"
OLD_BEST = "checkpoints_best"
BEST = "best"  # key of a checkpoint's data
CLASSES_FILE = "classes.json"


class StoredRun(NamedTuple):
    """The content of a run's directory.

    Attributes:
        config: the run's configuration.
        graph: the model without its parameters; `nnx.merge(graph, params)` puts them together.
        params: the model's parameters, or their moving average if the run keeps one.
        step: the checkpoint's step.
        classes: class names, () if unknown.
    """

    config: ConfigDict
    graph: nnx.GraphDef
    params: nnx.State
    step: int
    classes: tuple[str, ...]


def read_run(workdir: AnyPath, *, best: bool = False, sharding: jax.sharding.Sharding | None = None) -> StoredRun:
    """Read the newest checkpoint of a run that is whole; older ones are tried if it cannot be read.

    Args:
        workdir: the run's directory; it is not changed.
        best: read the checkpoint with the best validation metric instead.
        sharding: of every parameter; the default copies them to all devices.

    Raises:
        UserError: if there is no such checkpoint.
    """
    workdir = absolute(workdir)
    config_file = workdir / CONFIG_FILE
    require(config_file.is_file(), f"{workdir} holds no run: there is no {CONFIG_FILE} in it")
    config = read_config(config_file)
    graph, params = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))), nnx.Param)
    if sharding is None:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params)
    field = "params" if config.optimizer.ema_decay is None else "average"
    paths = [path for _, path in _best_first(workdir)] if best else newest_first(workdir / FOLDER)
    require(
        bool(paths) or not best,
        f"{workdir} holds no best checkpoint, which fine-tuning with validation keeps; leave out --best",
    )
    restored, broken = first_whole(paths, lambda path: read_arrays(path, {field: params})[field])
    for path, why in broken.items():
        logging.warning("%s cannot be read (%s); trying the next one", path, why)
    if restored is None:
        raise UserError(f"{workdir / FOLDER} holds no checkpoint that can be read; let the run reach its first one")
    path, params = restored
    return StoredRun(config, graph, params, int(path.name), _read_classes(workdir))


def _read_classes(workdir: epath.Path) -> tuple[str, ...]:
    if (path := workdir / CLASSES_FILE).is_file():
        return tuple(json.loads(path.read_bytes()))
    return old_class_names((workdir / CONFIG_FILE).read_bytes())


def newest_first(folder: epath.Path) -> list[epath.Path]:
    """Return the checkpoints that process 0 sees in a folder; a shared file system may show others fewer."""
    return [folder / name for name in broadcast_json([path.name for path in checkpoints_in(folder)])]


def checkpoints_in(folder: epath.Path) -> list[epath.Path]:
    """Return the checkpoints that this process sees in a folder, newest first."""
    steps = sorted(ocp.path.step.checkpoint_steps(folder), reverse=True) if folder.is_dir() else []
    return [folder / str(step) for step in steps]


class Scored(NamedTuple):
    """A checkpoint that had the best validation metric of its run when it was saved."""

    value: float
    folder: epath.Path


def best_checkpoint(workdir: AnyPath) -> Scored | None:
    """Return the checkpoint with the highest validation metric, None without one; every process must call it."""
    return next(iter(_best_first(absolute(workdir))), None)


def _best_first(workdir: epath.Path) -> list[Scored]:
    scores = []
    for path in checkpoints_in(workdir / FOLDER) + checkpoints_in(workdir / OLD_BEST):
        with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged checkpoint
            data = read_data(path)
            metric = data.get(BEST, {}) if path.parent.name == FOLDER else {**data, "samples": None}
            scores += [(value, str(path)) for value in metric.values() if value is not None]
    return [Scored(value, epath.Path(path)) for value, path in broadcast_json(sorted(scores, reverse=True))]


def read_data(path: epath.Path) -> dict[str, Any]:
    """Return the position in the data that belongs to a checkpoint."""
    return json.loads(data_file(path).read_bytes())


def data_file(path: epath.Path) -> epath.Path:
    """Return the file that Orbax writes a checkpoint's JSON to."""
    return path / "data" / "metadata"


def read_arrays(path: epath.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Read some fields of a checkpoint's state.

    A process waits for no other one: if only one of them failed, the others would wait forever.

    Args:
        path: the checkpoint, DIR/checkpoints/STEP.
        abstract: from field to a pytree of `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        Exception: of any type, if the files are damaged or hold other shapes.
    """
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    wanted = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(path / "state", args=wanted)


def first_whole(
    paths: Sequence[epath.Path], read: Callable[[epath.Path], T]
) -> tuple[tuple[epath.Path, T] | None, dict[epath.Path, str]]:
    """Return the first checkpoint that every process can read, and why each one before it cannot be read.

    Raises:
        UserError: if the bucket cannot be reached; then nothing is broken.
    """
    broken: dict[epath.Path, str] = {}
    for path in paths:
        content, failure = None, ""
        try:
            content = read(path)
        except Exception as error:  # damaged files make the libraries raise many types
            if from_bucket(error) and not isinstance(error, FileNotFoundError):
                raise UserError(f"{path}: {explain(error)}") from error
            failure = summarize(error)
        failures = [text for text in all_gather_json(failure) if text]
        if content is not None and not failures:
            return (path, content), broken
        broken[path] = failures[0]
    return None, broken


def summarize(error: BaseException) -> str:
    """Return the operating system's message if Orbax's error contains it, else the beginning of the error."""
    if message := re.search(r"([^:]+?) \[os_error_code", str(error)):
        return message[1].strip()
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what Orbax, asyncio and TensorStore print about errors that Orbax raises as well, hundreds of lines."""
    loggers = (logging.get_absl_logger(), std_logging.getLogger("asyncio"))
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_TolerantPolicy())
    for logger in loggers:
        logger.addFilter(_not_from_orbax)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_not_from_orbax)
        asyncio.set_event_loop_policy(policy)


def _not_from_orbax(record: std_logging.LogRecord) -> bool:
    return record.name != "asyncio" and not record.pathname.startswith(os.path.dirname(ocp.__file__))


class _TolerantLoop(asyncio.SelectorEventLoop):
    """An event loop that ignores callbacks after it was closed: TensorStore's, of the other arrays, when one failed."""

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        with contextlib.suppress(RuntimeError):
            return super().call_soon_threadsafe(*args, **kwargs)


class _TolerantPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _TolerantLoop()
