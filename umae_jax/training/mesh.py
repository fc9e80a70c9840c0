"""Devices as a mesh of `data` x `fsdp`: the batch is split over both axes, parameters and optimiser over `fsdp`."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices, `fsdp` of them to a copy of the parameters."""
    return jax.make_mesh((jax.device_count() // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Over the first axis, over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: Any) -> Any:  # noqa: ANN401 - any pytree
    """For each array of a pytree, its largest axis that `fsdp` divides; replicated where there is none."""
    fsdp = mesh.shape["fsdp"]

    def sharding(array: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [axis for axis, size in enumerate(array.shape) if size % fsdp == 0]
        if fsdp == 1 or not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))

    return jax.tree.map(sharding, state)
