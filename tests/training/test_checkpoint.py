import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

from umae_jax.errors import UserError
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.sharding import make_mesh, state_shardings
from umae_jax.training.state import init_state
from umae_jax.weights.stored_run import best_checkpoint, read_arrays


def abstract_on(mesh, state):
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
    return abstract_on(make_mesh(), make_state(0.0))


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("fsdp", [1, 4])
def test_restores_onto_another_mesh(tmp_path, abstract, fsdp):
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.any()
    assert checkpoints.restore(abstract) is None
    checkpoints.save(5, make_state(1.5), {"samples": 80, "skipped_images": 3})
    checkpoints.close()
    target = abstract_on(make_mesh(fsdp), make_state(0.0))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.any()
    state, data = checkpoints.restore(target)
    checkpoints.close()
    assert data == {"samples": 80, "skipped_images": 3}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1.5))
    assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(lambda a: a.sharding, target)


def test_restores_a_checkpoint_of_the_first_version(tmp_path, abstract):
    """The first version stored `skipped_images` in the state, not in the data item."""
    state = make_state(1.5)
    fields = {name: value for name, value in state._asdict().items() if value is not None}
    items = {"state": ocp.args.PyTreeSave(fields | {"skipped_images": jnp.int32(4)})}
    items["data"] = ocp.args.JsonSave({"samples": 48})
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(3, args=ocp.args.Composite(**items))
    checkpoints = Checkpoints(tmp_path)
    restored, data = checkpoints.restore(abstract)
    assert data == {"samples": 48, "skipped_images": 4}
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpoints.save(4, restored, data)
    assert checkpoints.restore(abstract)[1] == data
    checkpoints.close()


def test_only_large_arrays_are_stored_in_one_chunk_per_device(tmp_path):
    state = init_state({"large": jnp.zeros((1024, 512)), "small": jnp.zeros((64, 512))}, optax.scale_by_adam())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(state, state_shardings(make_mesh(), state)), {"samples": 0})
    checkpoints.close()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        params = reader.metadata(tmp_path / "checkpoints" / "1" / "state").item_metadata.tree["params"]
    assert params["large"].storage.chunk_shape == (1024 // 8, 512)
    assert params["small"].storage.chunk_shape == (64, 512)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path, best_metric="top1")
    for step, top1 in ((2, -0.5), (4, 0.75), (6, 0.25), (8, 0.75)):
        assert checkpoints.improves({"top1": top1}) == (step <= 4)
        checkpoints.save(step, make_state(1.0), {"samples": 0}, {"top1": top1, "other": 9.0})
    checkpoints.close()
    assert steps_in(tmp_path) == [4, 8]
    assert best_checkpoint(tmp_path) == (0.75, tmp_path / "checkpoints" / "4")
    # After a restart, too.
    checkpoints = Checkpoints(tmp_path, best_metric="top1")
    checkpoints.restore(abstract)
    checkpoints.save(9, make_state(1.0), {"samples": 0})
    assert not checkpoints.improves({"top1": 0.75})
    assert not checkpoints.improves({"other": 0.9})
    checkpoints.save(10, make_state(1.0), {"samples": 0}, {"top1": 0.8})
    checkpoints.save(11, make_state(1.0), {"samples": 0})
    checkpoints.close()
    assert steps_in(tmp_path) == [10, 11]
    assert best_checkpoint(tmp_path).value == 0.8


def test_the_restored_checkpoint_can_become_the_best(tmp_path, abstract):
    """A run may stop after it saves a checkpoint and before it validates it."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, make_state(1.0), {"samples": 64})
    checkpoints.close()
    assert best_checkpoint(tmp_path) is None
    checkpoints = Checkpoints(tmp_path, best_metric="top1")
    state, data = checkpoints.restore(abstract)
    checkpoints.save(4, state, data, {"top1": 0.1})
    for step in (5, 6):
        checkpoints.save(step, state, data)
    checkpoints.close()
    assert steps_in(tmp_path) == [4, 6]
    assert best_checkpoint(tmp_path) == (0.1, tmp_path / "checkpoints" / "4")


def test_a_best_checkpoint_of_the_first_version_is_compared_with_new_ones(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (6, 9, 12):
        checkpoints.save(step, make_state(1.0), {"samples": 0})
    checkpoints.close()
    best = tmp_path / "checkpoints_best"
    best.mkdir()
    for step, top1 in ((6, 0.5), (12, 0.7)):
        (tmp_path / "checkpoints" / str(step)).rename(best / str(step))
        (best / str(step) / "data" / "metadata").write_text(json.dumps({"samples": 0, "top1": top1}))
    checkpoints = Checkpoints(tmp_path, best_metric="top1")
    checkpoints.restore(abstract)  # at step 9: step 12 will be repeated
    assert [path.name for path in best.iterdir()] == ["6"]
    assert best_checkpoint(tmp_path) == (0.5, best / "6")
    assert not checkpoints.improves({"top1": 0.5})
    checkpoints.save(12, make_state(1.0), {"samples": 0}, {"top1": 0.7})
    checkpoints.close()
    assert best_checkpoint(tmp_path) == (0.7, tmp_path / "checkpoints" / "12")


def test_the_ema_is_stored_under_the_name_average(tmp_path):
    with_ema = init_state({"bias": jnp.full((7,), 2.0)}, optax.identity(), ema=True)
    abstract = abstract_on(make_mesh(), with_ema)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, with_ema._replace(params={"bias": jnp.zeros(7)}), {"samples": 0})
    checkpoints.wait()
    state, _ = checkpoints.restore(abstract)
    checkpoints.close()
    np.testing.assert_array_equal(state.eval_params["bias"], np.full(7, 2.0))
    arrays = read_arrays(epath.Path(tmp_path / "checkpoints" / "1"), {"average": abstract.params})
    assert list(arrays) == ["average"]
    assert arrays["average"]["bias"][0] == 2


def test_a_state_donated_during_its_save_is_saved_unchanged(tmp_path, abstract):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = jax.device_put(make_state(0.0), jax.tree.map(lambda a: a.sharding, abstract))
    for step in range(1, 4):
        state = advance(state)
        checkpoints.save(step, state, {"samples": step})
        for _ in range(50):
            state = advance(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract)
        assert {float(x) for x in np.unique(restored.params["kernel"])} == {1.0 + 51 * (step - 1)}
    checkpoints.close()


def test_keeps_the_newest_and_every_nth_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, make_state(step), {"samples": step})
    checkpoints.close()
    assert steps_in(tmp_path) == [4, 6, 7]


@pytest.mark.parametrize("damage", ["truncate", "remove", "empty"])
def test_moves_broken_checkpoints_aside_and_restores_the_newest_readable_one(tmp_path, abstract, caplog, damage, capfd):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, make_state(float(step)), {"samples": 10 * step})
    checkpoints.close()
    newest = tmp_path / "checkpoints" / "2"
    if damage == "remove":
        shutil.rmtree(newest / "state")
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "truncate" else b"")
    checkpoints = Checkpoints(tmp_path, keep=3)
    with caplog.at_level(logging.WARNING):
        state, data = checkpoints.restore(abstract)
    assert (fill_of(state), data["samples"]) == (1.0, 10)
    assert "checkpoint 2 cannot be read" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    checkpoints.save(2, state, data)  # step 2 can be saved again
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 2]
    assert (tmp_path / "checkpoints_unreadable" / "2").is_dir()


def test_if_no_checkpoint_can_be_read_nothing_is_moved(tmp_path, abstract):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1.0), {"samples": 10})
    checkpoints.close()
    other = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype, sharding=a.sharding), abstract)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"none of the checkpoints .* can be read"):
        checkpoints.restore(other)
    state, _ = checkpoints.restore(abstract)
    checkpoints.close()
    assert fill_of(state) == 1.0
    assert not (tmp_path / "checkpoints_unreadable").exists()


def test_a_full_disk_is_one_sentence(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    state = init_state({"kernel": jax.random.normal(jax.random.key(0), (64, 512))}, optax.identity())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        checkpoints.save(1, state, {"samples": 1})
        with pytest.raises(UserError, match=r"could not write a checkpoint .*too large"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "checkpoints" / "1").exists()
