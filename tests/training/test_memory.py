"""Device memory: what a step needs, and what to write if it is too much."""

import copy

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from umae_jax.errors import UserError
from umae_jax.tasks import make_task
from umae_jax.training import memory
from umae_jax.training.run import compile_changed
from umae_jax.training.sharding import make_mesh


def test_the_bytes_of_a_step_count_donated_arguments_once():
    def step(state, batch):
        return state + batch.sum(), batch.mean()

    compiled = jax.jit(step, donate_argnums=0).lower(jnp.zeros(1000), jnp.zeros(500)).compile()
    assert 6000 <= memory.step_bytes(compiled) < 6500
    assert memory.tree_bytes([jnp.zeros(3), jax.ShapeDtypeStruct((2, 2), jnp.int8)]) == 16


def test_settings_that_fit_are_found_from_the_compilers_count():
    config = tiny.get_config()
    task, mesh = make_task(config), make_mesh(1)

    def compile_step(changed):
        return compile_changed(task, changed, mesh)

    needed = {}
    for parts in (1, 2):
        changed = copy.deepcopy(config)
        changed.grad_accum_steps = parts
        needed[parts] = memory.step_bytes(compile_step(changed))
    assert needed[2] < needed[1]
    assert memory.find_fitting(config, compile_step, needed[2])[:2] == [
        "--config.grad_accum_steps=2",
        f"--config.batch_size={config.batch_size // 2}",
    ]
    assert memory.find_fitting(config, compile_step, 0) == []


def test_an_exhausted_device_is_explained_and_other_errors_are_not():
    config = tiny.get_config()

    def never(_config):
        raise UserError("invalid")

    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    with (
        pytest.raises(UserError, match=r"batch_size: .*smaller model"),
        memory.explain_exhaustion(config, never, jax.devices()[0]),
    ):
        raise exhausted
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory.explain_exhaustion(config, never, jax.devices()[0]),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_the_compiler_of_tpus_says_what_does_not_fit(tpus):
    config = tiny.get_config()
    config.batch_size = 16384

    def compile_step(changed):
        """Compile a program with 1 MiB of arguments and 1 MiB of results per image; a v5e has 15.75 GiB."""
        images = changed.batch_size // changed.grad_accum_steps
        sharding = jax.sharding.SingleDeviceSharding(tpus[0])
        argument = jax.ShapeDtypeStruct((images, 2**18), jnp.float32, sharding=sharding)
        return jax.jit(lambda x: x * 2).lower(argument).compile()

    settings = r"--config\.grad_accum_steps=4, or --config\.batch_size=4096"
    with (
        pytest.raises(UserError, match=f"batch_size: a step of 16384 .*{settings}"),
        memory.explain_exhaustion(config, compile_step, tpus[0]),
    ):
        compile_step(config)
