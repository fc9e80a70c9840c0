"""The mesh of devices, `data` x `fsdp`: the batch is sharded over both axes, parameters and optimizer over `fsdp`."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Names of the arrays to shard. Weight matrices take nearly all of the memory; gathering smaller arrays is not worth it.
SHARDED = re.compile(r"/kernel(/value)?$")


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange the devices (default: all) in a mesh, with `fsdp` devices per copy of the parameters."""
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp, fsdp)
    # Unlike `jax.make_mesh` it may split an axis of the torus between `data` and `fsdp`.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shardings_of(tree: Any) -> Any:  # noqa: ANN401 - any pytree
    """Return the sharding of each array of a pytree."""
    return jax.tree.map(lambda array: array.sharding, tree)


def local_rows(array: jax.Array) -> np.ndarray:
    """Return the rows of a batch [B, ...] that this process holds, in order, on the host."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def gather(tree: Any) -> Any:  # noqa: ANN401 - any pytree
    """Return whole arrays on the host, one array at a time; all processes must call it."""

    def whole(array: jax.Array) -> np.ndarray:
        local = array.is_fully_replicated or array.is_fully_addressable
        return jax.device_get(array if local else multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(whole, tree)


def spec_of(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Return the partition of an array: SHARDED arrays are split along their largest axis that `fsdp` divides.

    Args:
        name: path of a parameter, or of the optimizer's array for one, such as
            "params/encoder/stages/0/blocks/1/mlp/fc1/kernel/value".
        shape: of the array.
        fsdp: size of the mesh axis.
    """
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or not SHARDED.search(name):
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def state_shardings(mesh: Mesh, state: Any) -> Any:  # noqa: ANN401 - any pytree
    """Return the sharding of each array of a pytree, by `spec_of`."""

    def sharding(path: jax.tree_util.KeyPath, array: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, array.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(sharding, state)
