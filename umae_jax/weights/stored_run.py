"""A run's directory: its configuration, class names and checkpoints, read without the training code.

DIR/config.json, DIR/classes.json (classifiers and detectors)
DIR/checkpoints/STEP/state      arrays: step, params, optimizer, bad_steps, skipped_updates, average (if kept)
DIR/checkpoints/STEP/data       JSON: the position in the data; "best": the validation metric, if it was the best
DIR/checkpoints_best/STEP       of runs of the first version: the best checkpoint; its data holds the metric
"""

import asyncio
import contextlib
import importlib
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

from umae_jax.config import CONFIG_FILE, METHODS, old_class_names, read_config
from umae_jax.errors import UserError, require
from umae_jax.files import AnyPath, absolute, explain, first_line, raised_by_gcsfs
from umae_jax.multihost import all_gather_json, broadcast_json

T = TypeVar("T")

FOLDER = "checkpoints"
OLD_BEST = "checkpoints_best"
DATA_FILE = "data/metadata"  # Orbax writes a checkpoint's JSON to it
BEST = "best"  # key of that JSON
CLASSES_FILE = "classes.json"


class StoredRun(NamedTuple):
    """The configuration and one checkpoint of a run."""

    config: ConfigDict
    graph: nnx.GraphDef  # the model without its parameters; `nnx.merge(graph, params)` gives the model
    params: nnx.State  # the moving average of the parameters if the run keeps one
    step: int
    classes: tuple[str, ...]  # class names, () if unknown
    workdir: epath.Path


def read_run(
    workdir: AnyPath,
    *,
    best: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    build: Callable[[ConfigDict, nnx.Rngs], nnx.Module] | None = None,
) -> StoredRun:
    """Read a run and its newest readable checkpoint.

    Args:
        workdir: the run's directory, which is not changed.
        best: read the checkpoint with the best validation metric instead of the newest.
        sharding: of every parameter; None: replicate them on all devices.
        build: builds the model; None: the builder of its method.

    Raises:
        UserError: if there is no run, or no such checkpoint.
    """
    workdir = absolute(workdir)
    config_file = workdir / CONFIG_FILE
    require(config_file.is_file(), f"{workdir} holds no run: there is no {CONFIG_FILE} in it")
    config = read_config(config_file)
    build = build or importlib.import_module(METHODS[config.model.method].model).build_model
    graph, params = nnx.split(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))
    if sharding is None:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda x: x.update(sharding=sharding), params)
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
    names = workdir / CLASSES_FILE
    classes = tuple(json.loads(names.read_bytes())) if names.is_file() else old_class_names(config_file.read_bytes())
    return StoredRun(config, graph, params, int(path.name), classes, workdir)


def stored_config(workdir: AnyPath) -> ConfigDict | None:
    """Return the configuration of the run in a directory, None without a checkpoint; every process must call it."""
    workdir = absolute(workdir)
    file = workdir / CONFIG_FILE
    return read_config(file) if newest_first(workdir / FOLDER) and file.is_file() else None


def newest_first(folder: epath.Path) -> list[epath.Path]:
    """Return the checkpoints that process 0 sees in a folder; a shared file system may show fewer to the others."""
    return [folder / name for name in broadcast_json([path.name for path in checkpoints_in(folder)])]


def checkpoints_in(folder: epath.Path) -> list[epath.Path]:
    """Return the checkpoints that this process sees in a folder, newest first."""
    steps = sorted(ocp.path.step.checkpoint_steps(folder), reverse=True) if folder.is_dir() else []
    return [folder / str(step) for step in steps]


class Scored(NamedTuple):
    """A checkpoint that was the best of its run when it was saved, and its validation metric."""

    value: float
    folder: epath.Path


def best_checkpoint(workdir: AnyPath) -> Scored | None:
    """Return the checkpoint with the highest validation metric, or None; every process must call it."""
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
    """Return the position in the data that a checkpoint stores."""
    return json.loads((path / DATA_FILE).read_bytes())


def read_arrays(path: epath.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Read some fields of a checkpoint's state.

    Each process reads by itself: with a barrier, one failure would make the others wait forever.

    Args:
        path: the checkpoint, DIR/checkpoints/STEP.
        abstract: pytree of `jax.ShapeDtypeStruct`s with shardings, by field.

    Raises:
        Exception: of any type, if the files are damaged or hold other shapes.
    """
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(path / "state", args=arguments)


def first_whole(
    paths: Sequence[epath.Path], read: Callable[[epath.Path], T]
) -> tuple[tuple[epath.Path, T] | None, dict[epath.Path, str]]:
    """Return the first checkpoint that every process can read, and the errors of those before it.

    Raises:
        UserError: if the bucket cannot be reached, which does not mean that a checkpoint is broken.
    """
    broken: dict[epath.Path, str] = {}
    for path in paths:
        content, failure = None, ""
        try:
            content = read(path)
        except Exception as error:  # damaged files make Orbax raise many types
            if raised_by_gcsfs(error) and not isinstance(error, FileNotFoundError):
                raise UserError(f"{path}: {explain(error)}") from error
            failure = summarize(error)
        failures = [text for text in all_gather_json(failure) if text]
        if content is not None and not failures:
            return (path, content), broken
        broken[path] = failures[0]
    return None, broken


def summarize(error: BaseException) -> str:
    """Return the operating system's message if Orbax's error contains it, else the error's first line."""
    message = re.search(r"([^:]+?) \[os_error_code", str(error))
    return message[1].strip() if message else first_line(error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the hundreds of lines that Orbax, asyncio and TensorStore log about an error that Orbax also raises."""
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
    """An event loop that ignores callbacks after it is closed: TensorStore still sends them after an array failed."""

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        with contextlib.suppress(RuntimeError):
            return super().call_soon_threadsafe(*args, **kwargs)


class _TolerantPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _TolerantLoop()
