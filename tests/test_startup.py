"""The clock of a command's start, and the cache of compiled programs."""

import os
import threading
import warnings

import jax
import numpy as np
import pytest

from tests import commands
from umae_jax import startup
from umae_jax.weights.stored_run import read_run


@pytest.fixture
def unset(monkeypatch):
    """Unset the variables that choose a cache, and restore JAX's settings afterwards."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_enable_xla_caches")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def programs(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")}


def test_a_run_compiles_everything_once_and_a_second_run_reads_the_same_program(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JAX_EXPLAIN_CACHE_MISSES", "1")
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    options = ("--config.picture_every=3", "--config.checkpoint_every=4", "--config.total_steps=9")
    _, compiled = commands.pretrain(tmp_path / "compiled", *options)
    before, _, after = compiled.partition("step 5/9 ")  # by then it has done everything once
    assert "XLA compilation" in before
    assert "step 9/9 " in after
    assert "XLA compilation" not in after
    miss = "PERSISTENT COMPILATION CACHE MISS for 'jit_train_step'"
    assert miss in compiled
    kept = programs(tmp_path / "home" / "umae_jax")
    assert any(name.startswith("jit_train_step-") for name in kept)
    _, read = commands.pretrain(tmp_path / "read", *options)
    assert miss not in read
    assert programs(tmp_path / "home" / "umae_jax") == kept
    assert commands.lines(tmp_path / "read") == commands.lines(tmp_path / "compiled")
    states = (jax.device_get(read_run(tmp_path / name).params) for name in ("compiled", "read"))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_oldest_programs_are_deleted_first(tmp_path, unset, monkeypatch):
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    monkeypatch.setattr(startup, "MAX_CACHE_BYTES", 25)
    startup.use_cache(tmp_path)
    assert set(programs(tmp_path)) == {"new-cache", "middle-cache"}
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.parametrize("folder", ["/dev/null/cache", "/proc/cache"])
def test_a_folder_that_cannot_be_written_is_ignored_silently(folder, unset, capfd, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    startup.use_user_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_not_used(tmp_path, unset, monkeypatch):
    monkeypatch.setattr(startup, "MIN_FREE_BYTES", 2**80)
    startup.use_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


def test_the_variables_of_jax_take_precedence(tmp_path, unset, monkeypatch):
    startup.use_cache(None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "chosen"))
    startup.use_cache(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", False)  # as by JAX_ENABLE_COMPILATION_CACHE
    startup.use_cache(tmp_path / "ours")
    jax.config.update("jax_enable_compilation_cache", True)
    assert not (tmp_path / "ours").exists()


def test_the_summary_names_the_phases_that_took_long(monkeypatch):
    monkeypatch.setattr(startup, "_phases", {})
    monkeypatch.setattr(startup, "_last", 0.0)
    for now, phase in ((10.0, "imports"), (10.1, "data"), (13.1, "imports")):
        monkeypatch.setattr(startup.time, "monotonic", lambda now=now: now)
        startup.mark(phase)
    assert startup.summary() == "first step 13 s after the start: imports 13 s"


def test_a_slow_phase_is_announced_and_timed_and_a_short_one_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(startup, "NOTICE_SECONDS", 0.2)
    with startup.phase("reading"):
        pass
    assert capsys.readouterr().err == ""
    with startup.phase("compiling", "; once"):
        threading.Event().wait(0.6)
        assert capsys.readouterr().err == "compiling; once ...\n"
    assert capsys.readouterr().err == "compiling: 1 s\n"


def test_an_error_of_a_phase_is_not_preceded_by_its_name(capsys):
    with pytest.raises(ValueError, match="wrong"), startup.phase("reading"):
        raise ValueError("wrong")
    assert capsys.readouterr().err == ""
