"""The one loop of everything that trains: act, save, next batch, step; report the step before."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from umae_jax.data.loader import Batch
from umae_jax.errors import Interrupted, UserError
from umae_jax.signals import StopAsked, StopSignals
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.metrics import MetricsWriter, Progress
from umae_jax.training.step import Metrics, TrainState


class Action(NamedTuple):
    """Something done between steps, such as drawing a picture.

    Attributes:
        every: steps; done also before the first step and after the last. 0: never.
        run: from (step, state) to metrics to write, if any; may raise StopAsked, see `StopSignals.check`.
        metric: one of these. Where a run continues at a step that has it already, the action is not done again.
    """

    every: int
    run: Callable[[int, TrainState], dict[str, float]]
    metric: str = ""


class _Clock:
    """Speed, and the share of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._images, self._waited = time.monotonic(), 0, 0.0

    def next(self, batches: Iterator[Batch]) -> Batch:
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def count(self, images: int) -> None:
        self._images += images

    def rates(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = {"images_per_second": self._images / seconds, "data_wait": min(1.0, self._waited / seconds)}
        self.restart()
        return rates


def train(
    state: TrainState,
    *,
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    first_step: int,
    samples: int,
    total_steps: int,
    batch_size: int,
    checkpoints: Checkpoints,
    checkpoint_every: int,
    log_every: int,
    stop_after_bad_steps: int,
    signals: StopSignals,
    workdir: Path,
    actions: Sequence[Action] = (),
) -> TrainState:
    """Train from `first_step` to `total_steps`.

    Each step is dispatched before the metrics of the one before it are read, so that the device never waits for the
    log; nothing else is read from the device between two steps.

    Args:
        state: after `first_step` steps; donated.
        step: the compiled step.
        batches: from sample `samples` on.
        samples: seen so far.
        signals: what may ask the run to leave between two steps.

    Raises:
        Interrupted: when asked to leave, after saving.
        UserError: after `stop_after_bad_steps` steps in a row without a finite loss and gradient, or if a checkpoint
            cannot be written.
    """
    writer = MetricsWriter(workdir, first_step)
    progress = Progress(first_step, total_steps)
    clock = _Clock()
    saved = first_step if first_step else None

    def read(number: int, metrics: Metrics) -> None:
        """Read the metrics of a step, waiting for it; stop on bad ones, write and say them where due."""
        values = jax.device_get(metrics)
        clock.count(batch_size)
        progress.advance(number)
        if values.bad_steps >= stop_after_bad_steps:
            raise UserError(
                f"the loss or gradient was not finite in {values.bad_steps} steps in a row, up to step {number} "
                f"(loss {values.loss}); lower optimizer.base_learning_rate or set optimizer.clip_norm and start again, "
                f"which continues from the newest checkpoint in {workdir}"
            )
        if number % log_every == 0 or number == total_steps:
            line = {key: value.item() for key, value in values._asdict().items()} | clock.rates()
            writer.write(number, line)
            progress.report(number, line)

    try:
        pending: tuple[int, Metrics] | None = None
        number = first_step
        while True:
            stop = signals.received  # asked once: a signal that comes later waits for the next step
            last = number == total_steps
            due = [
                action.run
                for action in actions
                if action.every and (number % action.every == 0 or last) and not writer.has(number, action.metric)
            ]
            save = number != saved and (stop is not None or (number > 0 and (number % checkpoint_every == 0 or last)))
            if pending and (due or save):
                read(*pending)  # a state that is looked at or saved is one whose step was found good
                pending = None
            try:
                for act in due if stop is None else ():
                    if metrics := act(number, state):
                        writer.write(number, metrics)
                        progress.tell(number, metrics)
            except StopAsked:  # it is done from its beginning when the run goes on from here
                stop = signals.received
                save = number not in (0, saved)
            if save:
                checkpoints.save(number, state, samples)
                saved = number
            if stop is not None:
                checkpoints.wait()
                raise Interrupted(stop, number)
            if due or save:
                clock.restart()
            if last:
                break
            try:
                batch = clock.next(batches)
            except Exception:
                if signals.received is None:
                    raise
                continue  # a signal to the whole process group took the loader's workers along: round again, to save
            state, metrics_of_step = step(state, batch)
            samples += batch_size
            number += 1
            if pending:
                read(*pending)
            pending = (number, metrics_of_step)
        checkpoints.wait()
    finally:
        progress.close()
        writer.close()
    return state
