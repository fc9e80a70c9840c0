"""The one loop of everything that trains: act, save, next batch, step; report the step before."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax

from umae_jax import beginning, cli
from umae_jax.data.pipeline import Batch
from umae_jax.errors import Preempted, PreemptionRequested, UserError
from umae_jax.files import AnyPath
from umae_jax.multihost import StopSignal, Watchdog
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.metrics import Report
from umae_jax.training.step import Metrics, TrainState


class Action(NamedTuple):
    """Something done between steps, such as drawing a picture.

    Attributes:
        every: steps; done also before the first step and after the last. 0: never.
        run: from (step, state) to metrics to write, if any; may raise PreemptionRequested, see `StopSignal.check`.
        metric: one of these. Where a run continues at a step that has it already, the action is not done again.
    """

    every: int
    run: Callable[[int, TrainState], dict[str, float]]
    metric: str = ""


class Clock:
    """Speed, and the share of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._start, self._images, self._waited = time.monotonic(), 0, 0.0

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; time spent here is time waited."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def count(self, images: int) -> None:
        """So many images have been trained on."""
        self._images += images

    def rates(self) -> dict[str, float]:
        """`images_per_second` and `data_wait`, a fraction; counts anew."""
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
    stop: StopSignal,
    watchdog: Watchdog | None = None,
    workdir: AnyPath,
    actions: Sequence[Action] = (),
    done: Collection[str] = (),
) -> TrainState:
    """Train from `first_step` to `total_steps`.

    Each step is dispatched before the metrics of the one before it are read, so that the device never waits for the
    log; nothing else is read from the device between two steps.

    Args:
        state: after `first_step` steps; donated.
        step: the compiled step.
        batches: from sample `samples` on.
        samples: seen so far.
        stop: what may ask the run to leave between two steps.
        actions: what is done between steps.
        done: metrics of the first step that were written before.

    Raises:
        Preempted: when asked to leave, after saving.
        UserError: after `stop_after_bad_steps` steps in a row without a finite loss and gradient, or if a checkpoint
            cannot be written.
    """
    watchdog = watchdog or Watchdog(None)
    report = Report(workdir, first_step, total_steps)
    clock = Clock()
    saved = first_step if first_step else None

    def read(number: int, metrics: Metrics) -> None:
        """Read the metrics of a step, waiting for it; stop on bad ones, write and say them where due."""
        values = jax.device_get(metrics)
        clock.count(batch_size)
        report.advance(number)
        if number == first_step + 1:
            beginning.spent("the step")
            cli.say(beginning.summary())
        if values.bad_steps >= stop_after_bad_steps:
            raise UserError(
                f"the loss or gradient was not finite in {values.bad_steps} steps in a row, up to step {number} "
                f"(loss {values.loss}); lower optimizer.base_learning_rate or set optimizer.clip_norm and start again, "
                f"which continues from the newest checkpoint in {workdir}"
            )
        if number % log_every == 0 or number == total_steps:
            line = {key: value.item() for key, value in values._asdict().items()} | clock.rates()
            report.training(number, line)

    try:
        pending: tuple[int, Metrics] | None = None
        number = first_step
        while True:
            signal = stop.poll(number)  # once a step: one that comes later waits for the next
            last = number == total_steps
            due = [
                action.run
                for action in actions
                if action.every
                and (number % action.every == 0 or last)
                and not (number == first_step and action.metric in done)
            ]
            save = number != saved and (signal is not None or (number > 0 and (number % checkpoint_every == 0 or last)))
            if pending and (due or save):
                read(*pending)  # a state that is looked at or saved is one whose step was found good
                pending = None
            if due or save:
                watchdog.cancel()
            try:
                for act in due if signal is None else ():
                    if metrics := act(number, state):
                        report.measured(number, metrics)
            except PreemptionRequested:  # it is done from its beginning when the run goes on from here
                signal = stop.received
                save = number not in (0, saved)
            if save:
                report.flush()  # whoever goes on from here finds the metrics up to here
                checkpoints.save(number, state, samples)
                saved = number
            if signal is not None:
                checkpoints.wait()
                raise Preempted(signal, number)
            if due or save:
                clock.restart()
            if last:
                break
            if number == first_step:
                beginning.spent("what is measured before")
            watchdog.arm()
            batch = clock.next(batches)
            if number == first_step:
                beginning.spent("the first batch")
            state, metrics_of_step = step(state, batch)
            samples += batch_size
            number += 1
            if pending:
                read(*pending)
            pending = (number, metrics_of_step)
        checkpoints.wait()
        report.flush()
    finally:
        watchdog.cancel()
        report.close()
    return state
