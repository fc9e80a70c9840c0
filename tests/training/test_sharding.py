import math
import runpy

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from tests.commands import ROOT
from umae_jax.config import default_config
from umae_jax.tasks import make_task
from umae_jax.training.sharding import make_mesh, spec_of, state_shardings
from umae_jax.training.state import abstract_run, initialize


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("params/encoder/stages/0/blocks/1/mlp/fc1/kernel/value", (6, 8), PartitionSpec(None, "fsdp")),
        ("params/kernel/value", (16, 4), PartitionSpec("fsdp")),
        ("optimizer/0/mu/head/kernel/value", (8, 10), PartitionSpec("fsdp")),
        ("params/head/kernel/value", (3, 5), PartitionSpec()),
        ("params/head/bias/value", (8,), PartitionSpec()),
        ("params/mask_token/value", (1, 1, 512), PartitionSpec()),
        ("step", (), PartitionSpec()),
    ],
)
def test_weights_are_sharded_on_their_largest_axis_that_divides(name, shape, expected):
    assert spec_of(name, shape, 4) == expected
    assert spec_of(name, shape, 1) == PartitionSpec()


def test_parameters_and_optimizer_are_sharded_alike():
    mesh = make_mesh(4)
    params = {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
    state = {"params": params, "optimizer": ({"mu": params, "count": jax.ShapeDtypeStruct((), jnp.int32)},)}
    split, whole = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec())
    expected = {"params": {"kernel": split}, "optimizer": ({"mu": {"kernel": split}, "count": whole},)}
    assert state_shardings(mesh, state) == expected


@pytest.mark.parametrize("size", ["swin_tiny", "pvt_small", "vit_base"])
def test_99_percent_of_every_model_is_sharded(size):
    state = abstract_run(make_task(default_config(size)), make_mesh(8)).state
    leaves = jax.tree.leaves(state)
    whole = sum(leaf.size for leaf in leaves if leaf.sharding.is_fully_replicated)
    assert whole < 0.01 * sum(leaf.size for leaf in leaves)


def test_a_state_is_created_sharded():
    """No device creates more than its shard of a large array."""
    config = tiny.get_config()
    config.model.widths, config.model.heads = (128, 512), (4, 16)
    task = make_task(config)
    run = abstract_run(task, make_mesh(8))
    state = initialize(task, run)
    kernels = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert kernels
    for kernel in kernels:
        assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 8}


def test_a_billion_parameters_are_sharded_over_eight_devices():
    config = runpy.run_path(str(ROOT / "configs" / "pretrain_swin_billion.py"))["get_config"]()
    state = abstract_run(make_task(config), make_mesh(config.mesh.fsdp)).state
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 1e9
    leaves = jax.tree.leaves(state)
    whole = sum(leaf.size for leaf in leaves)
    assert sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves) < 1.02 * whole / 8
