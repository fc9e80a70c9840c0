"""Compiled programs are kept for the next time, and change nothing but the time."""

import os
import warnings

import jax
import numpy as np
import pytest

from tests import commands, tiny
from umae_jax import compilation_cache
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.runs import describe
from umae_jax.training.sharding import make_mesh

OPTIONS = ("--config.picture_every=6", "--config.total_steps=6")
MISS = "PERSISTENT COMPILATION CACHE MISS for 'jit_train_step'"


@pytest.fixture
def unset(monkeypatch):
    """No choice of the user's, and JAX as it was afterwards."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_enable_xla_caches")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def environment(home):
    return {
        **{name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"},
        "XDG_CACHE_HOME": str(home),
        "JAX_EXPLAIN_CACHE_MISSES": "1",
    }


def programs(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")}


def state_of(workdir):
    """What the newest checkpoint of a tiny run holds."""
    checkpoints = Checkpoints(workdir, read_only=True)
    state, _ = checkpoints.restore(describe(tiny.get_config(), make_mesh()).state)
    checkpoints.close()
    return state


def test_a_second_run_compiles_no_step_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    for name, value in environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    _, compiled = commands.pretrain(tmp_path / "compiled", *OPTIONS)
    kept = programs(tmp_path / "home" / "umae_jax")
    assert any(name.startswith("jit_train_step-") for name in kept)
    assert MISS in compiled
    _, read = commands.pretrain(tmp_path / "read", *OPTIONS)
    assert MISS not in read
    assert programs(tmp_path / "home" / "umae_jax") == kept
    assert commands.lines(tmp_path / "read") == commands.lines(tmp_path / "compiled")
    states = (jax.device_get(state_of(tmp_path / name)) for name in ("compiled", "read"))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_several_processes_on_processors_keep_nothing(tmp_path, monkeypatch):
    """Their programs have another key each time."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    environments = [environment(tmp_path / "home")] * 2
    options = ("--config=tests/tiny.py", "--workdir", tmp_path / "run", *OPTIONS)
    commands.end(commands.start_together("pretrain", *options, environments=environments))
    assert not list(tmp_path.rglob("*-cache"))


def test_a_run_compiles_nothing_once_all_has_been_done(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    options = ("--config.picture_every=3", "--config.checkpoint_every=4", "--config.total_steps=9")
    _, errors = commands.pretrain(tmp_path, *options)
    before, _, after = errors.partition("step 5/9 ")
    assert "XLA compilation" in before
    assert "step 9/9 " in after
    assert "XLA compilation" not in after


def test_the_programs_written_first_go_first(tmp_path, unset, monkeypatch):
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 25)
    compilation_cache.keep(tmp_path)
    assert set(programs(tmp_path)) == {"new-cache", "middle-cache"}
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.parametrize("folder", ["/dev/null/cache", "/proc/cache"])
def test_where_nothing_can_be_written_nothing_is_kept_nor_said(folder, unset, capfd, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    compilation_cache.keep_for_user()
    assert jax.config.jax_compilation_cache_dir is None
    assert capfd.readouterr() == ("", "")


def test_a_disk_with_no_room_is_left_alone(tmp_path, unset, monkeypatch):
    monkeypatch.setattr(compilation_cache, "ROOM", 2**80)
    compilation_cache.keep(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


def test_jax_own_variables_win(tmp_path, unset, monkeypatch):
    compilation_cache.keep(None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "chosen"))
    compilation_cache.keep(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", False)  # as by JAX_ENABLE_COMPILATION_CACHE
    compilation_cache.keep(tmp_path / "ours")
    jax.config.update("jax_enable_compilation_cache", True)
    assert not (tmp_path / "ours").exists()
