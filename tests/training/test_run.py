"""The engine, driven by a task that the package does not know."""

import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny, tiny_classifier, toy
from tests.commands import lines
from umae_jax.config import METHODS, default_config
from umae_jax.errors import Preempted, UserError
from umae_jax.multihost import StopSignal
from umae_jax.planning.assembly import build
from umae_jax.tasks import evaluation, make_task
from umae_jax.training.run import build_step, check_same_classes, check_same_run, durations, train
from umae_jax.training.sharding import make_mesh
from umae_jax.training.state import abstract_run
from umae_jax.weights.stored_run import best_checkpoint

DIR = Path("DIR")


@pytest.fixture(scope="module", autouse=True)
def _method():
    """Register the method as another package would."""
    METHODS["toy"] = toy.METHOD
    yield
    del METHODS["toy"]


def toy_task(**changes):
    config = default_config("swin_tiny", "toy")
    config.optimizer.update(base_learning_rate=0.5, warmup_steps=2)
    config.update({"batch_size": 16, "total_steps": 10, "checkpoint_every": 3, "log_every": 1, **changes})
    return make_task(config)


def run(workdir, task=None, **changes):
    with StopSignal() as stop:
        train(task or toy_task(**changes), workdir, stop)
    return workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("toy"))


def test_a_task_from_outside_trains_and_evaluates(finished):
    rows = lines(finished)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert all(row["red_error"] > 0 for row in rows if "loss" in row)
    evaluated = {row["step"]: row for row in rows if "negative_error" in row}
    assert list(evaluated) == [0, 4, 8, 10]
    assert all(row["evaluated"] == 20 for row in evaluated.values())
    assert evaluated[10]["negative_error"] > evaluated[0]["negative_error"]
    best = max((row["negative_error"], -step) for step, row in evaluated.items() if step)
    assert best_checkpoint(finished) == (best[0], finished / "checkpoints" / str(-best[1]))
    assert {-best[1], 9, 10} <= {int(path.name) for path in (finished / "checkpoints").iterdir()}


def test_a_finished_run_of_a_task_from_outside_can_be_evaluated(finished):
    last = lines(finished)[-1]
    run = evaluation.open_run(finished)
    assert run.step == last["step"] == 10
    for batch_size in (8, 24):
        values = evaluation.evaluate_run(run, batch_size=batch_size)[1]
        assert values["evaluated"] == 20
        assert values["negative_error"] == pytest.approx(last["negative_error"], rel=1e-6)


class Stops(toy.Task):
    """Asks to stop, as a signal would, in the loss of a step or in an evaluation."""

    def __init__(self, config, stop, *, evaluation):
        super().__init__(config)
        self.stop, self.evaluation = stop, evaluation

    def hooks(self, context):
        (hook,) = super().hooks(context)

        def evaluate(step, params):
            if step == self.evaluation:
                self.stop.received = signal.SIGTERM
            context.check()
            return hook.run(step, params)

        return [hook._replace(run=evaluate)]


@pytest.mark.parametrize("evaluation", [4, 10])
def test_a_run_stopped_in_an_evaluation_continues_as_if_never_stopped(finished, tmp_path, evaluation):
    with StopSignal() as stop, pytest.raises(Preempted, match=f"step {evaluation}"):
        train(Stops(toy_task().config, stop, evaluation=evaluation), tmp_path, stop)
    assert not any(row["step"] == evaluation and "negative_error" in row for row in lines(tmp_path))
    run(tmp_path)
    assert lines(tmp_path) == lines(finished)


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    run(finished)
    assert "has reached step 10 already" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_longer_schedule_continues_and_does_not_repeat_the_last_evaluation(finished, tmp_path):
    run(tmp_path, total_steps=4)
    run(tmp_path, total_steps=6)
    assert [row["step"] for row in lines(tmp_path) if "negative_error" in row] == [0, 4, 6]


class StopsEarly(toy.Task):
    """Ends the run at its second evaluation after the first step."""

    def stop_reason(self, scores):
        assert list(scores) == [0, 4, 8][: len(scores)]
        return "two are enough" if len(scores) == 3 else None


def test_a_run_ended_by_its_task_is_saved_and_goes_on_only_after_a_change(finished, tmp_path, capsys):
    run(tmp_path, StopsEarly(toy_task().config))
    assert "ending at step 8: two are enough" in capsys.readouterr().err
    assert [row for row in lines(finished) if row["step"] <= 8] == lines(tmp_path)
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 8
    run(tmp_path, StopsEarly(toy_task().config))
    assert "has ended at step 8 already: two are enough" in capsys.readouterr().err
    run(tmp_path)
    assert lines(tmp_path) == lines(finished)


class Diverges(toy.Task):
    def loss(self, model, batch):
        loss, scalars = super().loss(model, batch)
        late = batch["sample_index"].max() >= 3 * self.config.batch_size
        return jax.numpy.where(late, jax.numpy.nan, loss), scalars


def test_consecutive_bad_steps_end_the_run_before_anything_is_saved(tmp_path):
    task = Diverges(toy_task(stop_after_bad_steps=3).config)
    with pytest.raises(UserError, match="3 consecutive steps, up to step 6 "):
        run(tmp_path, task)
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) < 6


def test_metrics_are_logged_as_rarely_as_asked_and_at_the_end(tmp_path):
    run(tmp_path, total_steps=7, log_every=3)
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [3, 6, 7]


def test_all_devices_and_one_train_alike(finished, tmp_path):
    losses = [row["loss"] for row in lines(finished) if "loss" in row]
    accumulated = [row["loss"] for row in lines(run(tmp_path, grad_accum_steps=2)) if "loss" in row]
    np.testing.assert_allclose(accumulated, losses, rtol=1e-5)


# Whether a run may continue in a directory.


def test_a_classifier_of_other_classes_is_rejected():
    with pytest.raises(UserError, match=r"dog is emu here, none is owl here"):
        check_same_classes(("cat", "dog"), ("cat", "emu", "owl"), DIR)
    check_same_classes((), ("cat", "dog"), DIR)  # of a run that did not record them


def test_another_method_is_rejected():
    with pytest.raises(UserError, match=r"model.method is um_mae, not classifier"):
        check_same_run(tiny.get_config(), tiny_classifier.get_config(), DIR)


def test_other_changes_are_printed(capsys):
    before, after = tiny_classifier.get_config(), tiny_classifier.get_config()
    before.init, after.init = "one", "other"
    after.optimizer.weight_decay = 0.1
    check_same_run(before, after, DIR)
    printed = capsys.readouterr().err
    assert "init has changed" in printed
    assert "optimizer.weight_decay = 0.1 (was 0.05)" in printed


def test_a_warm_up_longer_than_the_run_is_cut(capsys):
    config = tiny.get_config()
    config.optimizer.warmup_steps = 100
    assert durations(config, 50) == (12, 12)
    assert "warm-up of 100 steps is cut to the 12" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_into_groups_is_rejected():
    task = toy_task(grad_accum_steps=2)
    task.group_size = 3
    with pytest.raises(UserError, match=r"batch_size: 16 .* multiple of 6"):
        build_step(task, abstract_run(task, make_mesh()), 1, 2)


def test_a_kernel_that_the_devices_cannot_run_is_rejected():
    config = tiny.get_config()
    config.fused_attention = True
    with pytest.raises(UserError, match=r"fused_attention.*TPU.*cpu"):
        build(config, make_mesh())
