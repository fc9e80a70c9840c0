"""What tests of models share."""

import jax
import pytest

from umae_jax.targets import find_target


@pytest.fixture
def tpus():
    """Four TPUs that need not be there, to compile for."""
    pytest.importorskip("libtpu", reason="the plan extra is not installed")  # part of the test extra
    cached = jax.config.jax_enable_compilation_cache
    yield find_target("v5e:2x2").devices
    jax.config.update("jax_enable_compilation_cache", cached)
