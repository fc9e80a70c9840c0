import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from umae_jax.errors import UserError
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.sharding import make_mesh, state_shardings
from umae_jax.training.step import init_state


def shapes_on(mesh, state):
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )


def make_state(fill):
    params = {"kernel": jnp.full((64, 512), fill), "bias": jnp.full((7,), fill)}
    return init_state(params, optax.scale_by_adam())


def fill_of(state):
    return float(state.params["bias"][0])


@pytest.fixture
def abstract():
    return shapes_on(make_mesh(), make_state(0.0))


def test_a_state_comes_back_onto_another_mesh(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.any()
    assert checkpoints.restore(abstract) is None
    checkpoints.save(5, make_state(1.5), samples=80)
    checkpoints.close()
    for fsdp in (1, 4):
        target = shapes_on(make_mesh(fsdp), make_state(0.0))
        checkpoints = Checkpoints(tmp_path)
        state, samples = checkpoints.restore(target)
        params, step = checkpoints.restore_part("params", target.params)
        checkpoints.close()
        assert (samples, step) == (80, 5)
        jax.tree.map(np.testing.assert_array_equal, state, make_state(1.5))
        jax.tree.map(np.testing.assert_array_equal, params, make_state(1.5).params)
        assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(lambda a: a.sharding, target)


def test_only_large_arrays_are_cut_among_the_devices(tmp_path):
    state = init_state({"large": jnp.zeros((1024, 512)), "small": jnp.zeros((64, 512))}, optax.scale_by_adam())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(state, state_shardings(make_mesh(), state)), samples=0)
    checkpoints.close()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        params = reader.metadata(tmp_path / "checkpoints" / "1" / "state").item_metadata.tree["params"]
    assert params["large"].storage.chunk_shape == (1024 // 8, 512)
    assert params["small"].storage.chunk_shape == (64, 512)


def test_the_best_are_forgotten_but_for_those_that_may_be_gone_on_from(tmp_path):
    checkpoints = Checkpoints(tmp_path, folder="checkpoints_best", keep=None)
    for step in (2, 4, 6, 9, 12):
        checkpoints.save(step, make_state(1.0), samples=0, top1=step / 100)
    checkpoints.wait()
    checkpoints.forget(after=10, before=7)
    assert checkpoints.note("top1") == 0.09
    assert checkpoints.note("no such") is None
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints_best").iterdir()) == [6, 9]


def test_an_average_is_saved_where_there_is_one(tmp_path):
    with_average = init_state({"bias": jnp.full((7,), 2.0)}, optax.identity(), average=True)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, with_average._replace(params={"bias": jnp.zeros(7)}), samples=0)
    checkpoints.wait()
    abstract = shapes_on(make_mesh(), with_average)
    state, _ = checkpoints.restore(abstract)
    np.testing.assert_array_equal(state.result["bias"], np.full(7, 2.0))
    assert checkpoints.restore_part("average", abstract.params)[0]["bias"][0] == 2
    checkpoints.close()


def test_a_state_donated_while_it_is_written_is_written_as_it_was(tmp_path, abstract):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = jax.device_put(make_state(0.0), jax.tree.map(lambda a: a.sharding, abstract))
    for step in range(1, 4):
        state = advance(state)
        checkpoints.save(step, state, samples=step)
        for _ in range(50):
            state = advance(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract)
        assert {float(x) for x in np.unique(restored.params["kernel"])} == {1.0 + 51 * (step - 1)}
    checkpoints.close()


def test_the_newest_are_kept_and_each_nth_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, make_state(step), step)
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]


@pytest.mark.parametrize("harm", ["truncate", "remove", "empty"])
def test_a_broken_checkpoint_is_moved_aside_for_the_newest_whole_one(tmp_path, abstract, caplog, harm, capfd):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, make_state(float(step)), 10 * step)
    checkpoints.close()
    newest = tmp_path / "checkpoints" / "2"
    if harm == "remove":
        shutil.rmtree(newest / "state")
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if harm == "truncate" else b"")
    checkpoints = Checkpoints(tmp_path, keep=3)
    with caplog.at_level(logging.WARNING):
        state, samples = checkpoints.restore(abstract)
    assert (fill_of(state), samples) == (1.0, 10)
    assert "checkpoint 2 cannot be read" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    checkpoints.save(2, state, 20)  # its place is free again
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert (tmp_path / "checkpoints_unreadable" / "2").is_dir()


def test_when_none_can_be_read_nothing_is_touched(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1.0), 10)
    checkpoints.close()
    other = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype, sharding=a.sharding), abstract)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"none of the checkpoints .* can be read"):
        checkpoints.restore(other)
    state, _ = checkpoints.restore(abstract)
    checkpoints.close()
    assert fill_of(state) == 1.0
    assert not (tmp_path / "checkpoints_unreadable").exists()


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")

    def write():
        checkpoints.save(1, make_state(0.0), 1)
        checkpoints.wait()

    with pytest.raises(UserError, match="could not write a checkpoint"):
        write()
