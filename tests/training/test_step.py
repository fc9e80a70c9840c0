import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from tests import tiny
from umae_jax.config import default_config
from umae_jax.models.kernels import compiler_options
from umae_jax.planning.targets import find_target
from umae_jax.tasks import make_task
from umae_jax.training.optimizer import learning_rate_schedule, make_optimizer
from umae_jax.training.programs import global_batch
from umae_jax.training.sharding import batch_sharding
from umae_jax.training.state import abstract_run, init_state, initialize
from umae_jax.training.step import Outputs, loss_function, lower_step, make_train_step


def mesh_of(data, fsdp):
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_of(config, mesh, number=0, kind=0):
    rng = np.random.default_rng(number)
    size = config.batch_size
    batch = {
        "image": rng.integers(0, 256, (size, *config.image_size, 3), dtype=np.uint8),
        "sample_index": np.arange(size * number, size * (number + 1), dtype=np.uint32),
    }
    batch["image"][0, 0, 0, 0] = kind  # see poisoned_loss
    return jax.device_put(batch, batch_sharding(mesh))


def prepare(config, mesh, loss=None, grad_accum_steps=1):
    task = make_task(config)
    run = abstract_run(task, mesh)
    loss = loss or loss_function(task, run.graph)
    schedule = learning_rate_schedule(config.optimizer, batch_size=256, warmup_steps=1, total_steps=10)
    step = make_train_step(loss, run.optimizer, schedule, grad_accum_steps=grad_accum_steps)
    compiled = lower_step(step, run.state, global_batch(task, mesh), mesh).compile()
    return initialize(task, run), compiled


VIT = {"encoder": "vit", "patch": 8, "widths": (8,), "depths": (2,), "heads": (2,), "mlp_ratios": (4,)}
MODELS = {
    "pvt": {"encoder": "pvt", "sr_ratios": (2, 1)},
    "simmim": {"method": "simmim", "norm_pix_loss": False},
    "mae": VIT | {"method": "mae", "decoder_factor": 1},
}


def run(mesh, steps=3, model=None, **changes):
    config = tiny.get_config()
    grad_accum_steps = changes.pop("grad_accum_steps", 1)
    with config.unlocked():
        config.update(changes)
        config.model.update(model or {})
    state, step = prepare(config, mesh, grad_accum_steps=grad_accum_steps)
    losses = []
    for number in range(steps):
        state, metrics = step(state, batch_of(config, mesh, number))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    return run(mesh_of(1, 1))


@pytest.mark.parametrize("shape", [(8, 1), (1, 8)])
def test_losses_are_equal_on_any_number_of_devices(one_device, shape):
    losses, state = run(mesh_of(*shape))
    np.testing.assert_allclose(losses, one_device[0], rtol=2e-6)
    sharded = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert bool(sharded) == (shape[1] > 1)


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_every_model_are_equal_on_1_and_8_devices(name):
    (one, _), (eight, _) = (run(mesh_of(*shape), model=MODELS[name]) for shape in ((1, 1), (2, 4)))
    np.testing.assert_allclose(eight, one, rtol=2e-6)
    assert len(set(one)) == 3


@pytest.mark.parametrize("shape", [(1, 1), (8, 1)])
def test_gradient_accumulation_equals_the_whole_batch(one_device, shape):
    losses, _ = run(mesh_of(*shape), grad_accum_steps=2)
    np.testing.assert_allclose(losses, one_device[0], rtol=2e-6)


def test_bfloat16_keeps_the_state_in_float32():
    losses, state = run(mesh_of(1, 1), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert np.isfinite(losses).all()


def test_the_state_is_donated_and_steps_do_not_recompile(caplog):
    config, mesh = tiny.get_config(), mesh_of(8, 1)
    state, step = prepare(config, mesh)
    before = state
    batches = [batch_of(config, mesh, number) for number in range(3)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for batch in batches:
            state, _ = step(state, batch)
        assert not caplog.records
        jax.jit(lambda x: x + 1)(batches[0]["sample_index"])
        assert "Compiling" in caplog.text  # the log does record compilations
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert int(state.step) == 3


def test_the_whole_state_is_updated_in_place():
    config, mesh = tiny.get_config(), mesh_of(1, 1)
    state, step = prepare(config, mesh)
    assert step.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    program = step.as_text()
    assert "(%state_params" in program  # the pattern below matches the names in this program
    assert not re.search(r"= f32\S* copy(-start)?\(%state_", program)


def test_compiler_options_depend_on_the_device(monkeypatch, tpus):
    for device in (tpus[0], find_target("v5p:2x2x1").devices[0]):
        assert "xla_tpu_scoped_vmem_limit_kib" in compiler_options(device)
    assert not compiler_options(jax.devices()[0])
    monkeypatch.setattr("umae_jax.training.step.compiler_options", lambda device: {"xla_unheard_of": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_unheard_of"):
        prepare(tiny.get_config(), mesh_of(1, 1))


def poisoned_loss(params, batch):
    """A loss whose value (kind 1: nan, 2: inf) or whose gradient alone (kind 3) is not finite."""
    size = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
    kinds = (lambda x: x, lambda x: x * jnp.nan, lambda x: x / 0.0, lambda x: jnp.sqrt(x - x))
    return jax.lax.switch(batch["image"][0, 0, 0, 0].astype(jnp.int32), kinds, size), Outputs({})


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_non_finite_loss_or_gradient_skips_the_update_and_is_counted(kind):
    config, mesh = tiny.get_config(), mesh_of(1, 1)
    state, step = prepare(config, mesh, poisoned_loss)
    good, bad = batch_of(config, mesh), batch_of(config, mesh, kind=kind)

    def counts(metrics):
        return int(metrics["bad_steps"]), int(metrics["skipped_updates"])

    state, _ = step(state, good)
    before = jax.device_get((state.params, state.optimizer))
    state, metrics = step(state, bad)
    assert (*counts(metrics), int(state.step)) == (1, 1, 2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.optimizer)))
    state, metrics = step(state, bad)
    assert counts(metrics) == (2, 2)
    state, metrics = step(state, good)
    assert counts(metrics) == (0, 2)
    changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), before[0], jax.device_get(state.params))
    assert any(jax.tree.leaves(changed))


def small_step(loss, ema_decay=0.9):
    """Return the optimizer and the jitted step of SGD with an EMA of the parameters."""
    optimizer = optax.identity()
    step = make_train_step(
        lambda params, batch: (loss(params), Outputs({})), optimizer, lambda step: 0.1, ema_decay=ema_decay
    )
    return optimizer, jax.jit(step)


def test_ema_follows_the_parameters():
    params = {"x": jnp.array([1.0, 2.0])}
    optimizer, step = small_step(lambda params: params["x"].sum())
    state = init_state(params, optimizer, ema=True)
    expected = np.array([1.0, 2.0])
    for number in range(1, 4):
        state, _ = step(state, {})
        expected = 0.9 * expected + 0.1 * (np.array([1.0, 2.0]) - 0.1 * number)
        np.testing.assert_allclose(state.eval_params["x"], expected, rtol=1e-6)
    assert init_state(params, optimizer).eval_params is params


def test_the_moving_average_stays_finite_where_an_update_is_skipped():
    optimizer, step = small_step(lambda params: params["x"].sum() * jnp.inf)
    state, metrics = step(init_state({"x": jnp.ones(2)}, optimizer, ema=True), {})
    assert int(metrics["skipped_updates"]) == 1
    np.testing.assert_array_equal(state.eval_params["x"], np.ones(2))


class Statistic(nnx.Module):
    """A weight that is trained on inputs normalised by a running mean."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(1))
        self.mean = nnx.BatchStat(jnp.zeros(1))


class StatisticTask:
    def loss(self, model, batch):
        loss = ((batch["x"] - model.mean[...]) * model.weight[...]).sum()
        model.mean[...] = 0.5 * model.mean[...] + 0.5 * batch["x"].mean()
        return loss, {}


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_running_statistics_follow_the_batches_and_not_the_optimizer(grad_accum_steps):
    graph, params = nnx.split(Statistic())
    recipe = default_config().optimizer
    optimizer = make_optimizer(recipe, frozen=("mean",))
    task = StatisticTask()
    step = make_train_step(
        loss_function(task, graph), optimizer, lambda step: 0.1, grad_accum_steps=grad_accum_steps, ema_decay=0.5
    )
    state = init_state(params, optimizer, ema=True)
    step = jax.jit(step)
    state, _ = step(state, {"x": jnp.array([1.0, 3.0])})
    np.testing.assert_allclose(state.params["mean"][...], [1.0])
    np.testing.assert_allclose(state.ema["mean"][...], [0.5])
    assert state.params["weight"][...] != 1
    skipped, metrics = step(state, {"x": jnp.array([1.0, jnp.nan])})
    assert metrics["skipped_updates"] == 1
    np.testing.assert_allclose(skipped.params["mean"][...], [1.0])
