"""Settings and fixtures of all tests: 8 simulated devices, strict promotion, cached and unoptimised compilation."""

import os
from pathlib import Path

import pytest

from tests import commands

# JAX reads these on import, in the commands that tests start too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", commands.xla_flags(devices=8))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")


@pytest.fixture
def tpus(monkeypatch):
    """Describe four absent TPUs to compile for."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # restored afterwards: finding TPUs unsets it
    pytest.importorskip("libtpu", reason="the plan extra is not installed")  # part of the test extra
    import jax  # after the settings above
    from jax.experimental.compilation_cache import compilation_cache

    from umae_jax.planning.targets import find_target

    cached = jax.config.jax_enable_compilation_cache
    yield find_target("v5e:2x2").devices
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()  # JAX reads the setting only once
