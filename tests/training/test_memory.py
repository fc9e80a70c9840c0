"""Device memory: what a step needs, and what to write if it is too much."""

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from umae_jax.config import check
from umae_jax.errors import UserError
from umae_jax.training import memory


def test_the_bytes_of_a_step_count_donated_arguments_once():
    def step(state, batch):
        return state + batch.sum(), batch.mean()

    compiled = jax.jit(step, donate_argnums=0).lower(jnp.zeros(1000), jnp.zeros(500)).compile()
    assert 6000 <= memory.step_bytes(compiled) < 6500
    assert memory.tree_bytes([jnp.zeros(3), jax.ShapeDtypeStruct((2, 2), jnp.int8)]) == 16


def compile_program(config, device):
    """Compile a program with 1 MiB of arguments and 1 MiB of results per image of a micro-batch, for one device."""
    images = config.batch_size // config.grad_accum_steps
    argument = jax.ShapeDtypeStruct((images, 2**18), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    return jax.jit(lambda x: x * 2).lower(argument).compile()


def test_settings_that_fit_are_found_from_the_compilers_count():
    config = tiny.get_config()

    def compile_step(changed):
        check(changed, 1)
        return compile_program(changed, jax.devices()[0])

    assert memory.find_fitting(config, compile_step, 8 * 2**20) == [
        *("--config.grad_accum_steps=4", f"--config.batch_size={config.batch_size // 4}"),
        *(
            "--config.grad_accum_steps=4 --config.rematerialize=blocks",
            "--config.batch_size=4 --config.rematerialize=blocks",
        ),
    ]
    assert memory.find_fitting(config, compile_step, 8 * 2**20, fixed_batch=True) == [
        "--config.grad_accum_steps=4",
        "--config.grad_accum_steps=4 --config.rematerialize=blocks",
    ]
    assert memory.find_fitting(config, compile_step, 0) == []


def test_an_exhausted_device_is_explained_and_other_errors_are_not():
    config = tiny.get_config()

    def never(_config):
        raise UserError("invalid")

    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    with (
        pytest.raises(UserError, match=r"batch_size: .*smaller model"),
        memory.explain_exhaustion(config, never, None),
    ):
        raise exhausted
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory.explain_exhaustion(config, never, None),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_the_compiler_of_tpus_says_what_does_not_fit(tpus):
    config = tiny.get_config()
    config.batch_size = 16384

    settings = r"--config\.grad_accum_steps=4, or --config\.batch_size=4096"
    with (
        pytest.raises(UserError, match=f"batch_size: a step of 16384 .*{settings}"),
        memory.explain_exhaustion(config, lambda changed: compile_program(changed, tpus[0]), None),
    ):
        compile_program(config, tpus[0])  # a v5e has 15.75 GiB
