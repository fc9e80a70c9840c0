import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from umae_jax.planning.compiled import analyze
from umae_jax.planning.hlo import Collective
from umae_jax.training.sharding import make_mesh


def test_statistics_of_a_real_program():
    mesh = make_mesh()
    sharded, replicated = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=sharded)
    kernel = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=replicated)
    lowered = jax.jit(lambda rows, kernel: (rows @ kernel).sum(0), out_shardings=replicated).lower(rows, kernel)
    stats = analyze(lowered.compile(), 8)
    assert stats.argument_bytes == 2 * 32 * 4 + 32 * 64 * 4
    assert stats.cycles is None
    assert stats.collectives == (Collective("all-reduce", 8, 1, 64 * 4),)
    assert stats.peak_bytes >= stats.argument_bytes
    assert np.isfinite(stats.bytes_accessed)


def test_a_program_that_cannot_be_read_has_memory_but_no_cycles(monkeypatch, capsys):
    compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(8)).compile()

    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(compiled, "as_text", fail)
    stats = analyze(compiled, 1)
    assert stats.argument_bytes == 32
    assert (stats.cycles, stats.collectives) == (None, ())
    assert "cannot be read" in capsys.readouterr().err
