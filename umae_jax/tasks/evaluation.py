"""Evaluation and predictions of a stored run of any task."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from umae_jax.config import check_values
from umae_jax.errors import naming, require
from umae_jax.files import AnyPath
from umae_jax.tasks import make_task, probing
from umae_jax.training.sharding import make_mesh, replicated
from umae_jax.training.task import Prediction
from umae_jax.weights.stored_run import StoredRun, read_run


def open_run(
    workdir: AnyPath,
    *,
    best: bool = False,
    source: str | None = None,
    validation: str | None = None,
    stage: int | None = None,
    scales: Sequence[int] = (),
    flip: bool = False,
) -> StoredRun:
    """Read a run, its parameters replicated on every device; arguments that are not None override its configuration.

    Raises:
        UserError: if the directory holds no run, or the run has no such stage.
    """
    with naming("--workdir"):
        run = read_run(
            workdir,
            best=best,
            sharding=replicated(make_mesh()),
            build=lambda config, rngs: make_task(config).build_model(rngs),
        )
    config = run.config.unlock()
    config.data.source = source or config.data.source
    config.validation.source = validation or config.validation.source
    if stage is not None:
        stages = len(config.model.depths)
        require(-stages <= stage < stages, f"--stage: {stage} is not in {-stages}..{stages - 1}")
        config.probe.stage = stage
    if scales or flip:
        require("scales" in config.validation, "--scale, --flip: only a detector sees images in several views")
        config.validation.scales = tuple(scales) or config.validation.scales
        config.validation.flip = flip or config.validation.flip
        check_values(config)
    return run


def evaluate_run(run: StoredRun, *, probe: str | None = None, batch_size: int = 256) -> Prediction:
    """Evaluate a run, or a probe of its features, on its validation data.

    Args:
        run: from `open_run`.
        probe: "knn" or "linear"; None: evaluate the task itself.
        batch_size: global; rounded up to a multiple of the number of devices.

    Returns:
        A summary in one line, and the metrics by name.
    """
    batch_size = _round_up(batch_size)
    if probe is not None:
        return probing.probe_run(run, probe, make_mesh(), batch_size)
    return make_task(run.config).evaluate(run, make_mesh(), batch_size)


def predict_run(
    run: StoredRun, images: Path, *, batch_size: int = 256, output: AnyPath | None = None
) -> Iterator[Prediction]:
    """Predict for an image file or each image of a folder; see `evaluate_run` and `BaseTask.predict`."""
    return make_task(run.config).predict(run, images, make_mesh(), _round_up(batch_size), output)


def _round_up(batch_size: int) -> int:
    """Round up to a multiple of the number of devices."""
    return -(-batch_size // jax.device_count()) * jax.device_count()
