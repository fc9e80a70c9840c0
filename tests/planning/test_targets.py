import math

import jax
import jax.numpy as jnp
import pytest

from umae_jax.errors import UserError
from umae_jax.planning.hardware import GIB
from umae_jax.planning.targets import OutOfMemory, Target, compile_for, find_target


def test_out_of_memory_says_how_much_is_needed_if_known():
    assert str(OutOfMemory(math.inf)) == "does not fit"
    assert str(OutOfMemory(20.5 * GIB)) == "needs 20.50 GiB"


def test_a_program_larger_than_the_memory_does_not_fit():
    target = Target("a CPU", jax.devices()[:1], None, memory=1000)
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(1000))
    with pytest.raises(OutOfMemory) as error:
        compile_for(lowered, target)
    assert error.value.required >= 8000


def test_the_tpu_compiler_reports_the_memory_that_a_program_needs(tpus):
    """Its message is parsed, so this fails if the wording changes."""
    sharding = jax.sharding.SingleDeviceSharding(tpus[0])
    huge = jax.ShapeDtypeStruct((5 * 2**30,), jnp.float32, sharding=sharding)
    with pytest.raises(OutOfMemory) as error:
        compile_for(jax.jit(lambda x: x + 1).lower(huge), find_target("v5e:2x2"))
    assert 40 * GIB <= error.value.required < 50 * GIB


def test_an_absent_gpu_is_an_error():
    with pytest.raises(UserError, match=r"--topology: H100 .*8 x cpu"):
        find_target("H100")
