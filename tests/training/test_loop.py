import itertools
import json
import signal

import jax.numpy as jnp
import pytest

from umae_jax.errors import Preempted, UserError
from umae_jax.multihost import StopSignal
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.loop import Action, train
from umae_jax.training.step import Metrics, TrainState


def state_at(step):
    return TrainState(jnp.int32(step), {"x": jnp.float32(step)}, (), jnp.int32(0), jnp.int32(0), jnp.int32(0))


class Recorder:
    """A step and its surroundings that write down in which order they are called."""

    def __init__(self, workdir, bad_from=10**9):
        self.workdir, self.bad_from = workdir, bad_from
        self.calls = []
        self.stop = StopSignal()
        self.batches = itertools.repeat(None)

    def step(self, state, batch):
        number = int(state.step) + 1
        self.calls.append(f"step {number}")
        bad = max(0, number - self.bad_from + 1)
        metrics = Metrics(jnp.float32(1 / number), *(jnp.float32(0),) * 2, jnp.int32(bad), jnp.int32(0), jnp.int32(0))
        return state_at(number), metrics

    def act(self, step, state):
        assert int(state.step) == step
        self.calls.append(f"act {step}")
        return {"accuracy": 0.5}

    def train(self, total, first=0, every=2, **options):
        checkpoints = Checkpoints(self.workdir)
        original = checkpoints.save

        def save(step, state, samples):
            assert int(state.step) == step
            self.calls.append(f"save {step} at {samples}")
            original(step, state, samples)

        checkpoints.save = save
        options = {"checkpoint_every": 3, "log_every": 1, "stop_after_bad_steps": 3, **options}
        try:
            return train(
                state_at(first),
                step=self.step,
                batches=self.batches,
                first_step=first,
                samples=4 * first,
                total_steps=total,
                batch_size=4,
                checkpoints=checkpoints,
                stop=self.stop,
                workdir=self.workdir,
                actions=[Action(every, self.act, "accuracy")],
                **options,
            )
        finally:
            checkpoints.close()

    def lines(self):
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_in_an_action_breaks_it_off_to_be_done_again(tmp_path):
    recorder = Recorder(tmp_path)
    act = recorder.act

    def interrupted(step, state):
        if step == 2:
            recorder.stop.received = signal.SIGTERM
        recorder.stop.check()
        return act(step, state)

    recorder.act = interrupted
    with pytest.raises(Preempted):
        recorder.train(5, checkpoint_every=100)
    assert recorder.calls == ["act 0", "step 1", "step 2", "save 2 at 8"]
    again = Recorder(tmp_path)
    again.train(3, first=2)
    assert again.calls == ["act 2", "step 3", "act 3", "save 3 at 12"]


def test_an_action_whose_metric_is_there_is_not_done_again(tmp_path):
    Recorder(tmp_path).train(4, checkpoint_every=2)
    again = Recorder(tmp_path)
    again.train(5, first=4, done=["accuracy"])
    assert again.calls == ["step 5", "act 5", "save 5 at 20"]
    assert [line["step"] for line in again.lines() if "accuracy" in line] == [0, 2, 4, 5]


def test_the_order_is_act_save_step(tmp_path):
    recorder = Recorder(tmp_path)
    state = recorder.train(5)
    assert int(state.step) == 5
    assert recorder.calls == [
        *("act 0", "step 1", "step 2", "act 2", "step 3", "save 3 at 12", "step 4", "act 4", "step 5"),
        *("act 5", "save 5 at 20"),
    ]
    losses = [(line["step"], line["loss"]) for line in recorder.lines() if "loss" in line]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert [line["step"] for line in recorder.lines() if "accuracy" in line] == [0, 2, 4, 5]


def test_it_goes_on_from_where_it_was(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.train(6, first=3, every=0)
    assert recorder.calls == ["step 4", "step 5", "step 6", "save 6 at 24"]


def test_bad_steps_in_a_row_stop_it_before_anything_is_saved(tmp_path):
    recorder = Recorder(tmp_path, bad_from=4)
    with pytest.raises(UserError, match="not finite in 3 steps in a row, up to step 6 "):
        recorder.train(20, every=0)
    assert [call for call in recorder.calls if call.startswith("save")] == ["save 3 at 12"]


def test_a_signal_during_an_action_saves_at_the_next_step(tmp_path):
    recorder = Recorder(tmp_path)
    act = recorder.act

    def signalled(step, state):
        if step == 4:
            recorder.stop.received = signal.SIGTERM
        return act(step, state)

    recorder.act = signalled
    with pytest.raises(Preempted, match="stopped by SIGTERM at step 5"):
        recorder.train(20, every=2, checkpoint_every=100)
    assert recorder.calls[-3:] == ["act 4", "step 5", "save 5 at 20"]
    assert Checkpoints(tmp_path).any()


def test_a_signal_before_the_first_step_saves_that(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.stop.received = signal.SIGINT
    with pytest.raises(Preempted, match="stopped by SIGINT at step 0"):
        recorder.train(20)
    assert recorder.calls == ["save 0 at 0"]


def test_logs_as_rarely_as_asked_and_at_the_end(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.train(7, every=0, log_every=3)
    assert [line["step"] for line in recorder.lines()] == [3, 6, 7]
