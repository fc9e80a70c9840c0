"""Devices as a mesh of `data` x `fsdp`: the batch is split over both axes, parameters and optimiser over `fsdp`."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))

# By the name of an array: whether its largest axis that `fsdp` divides is split. Kernels are nearly all there is; the
# rest is not worth the gathering.
RULES = ((r"/kernel(/value)?$", True), (r"", False))


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or some, `fsdp` of them to a copy of the parameters."""
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp, fsdp)
    # Unlike `jax.make_mesh` it may give a part of a torus' axis to `fsdp`.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Over the first axis, over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings_of(tree: Any) -> Any:  # noqa: ANN401 - any pytree
    """The sharding of each array."""
    return jax.tree.map(lambda array: array.sharding, tree)


def spec_of(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """How an array is split over the `fsdp` axis: the first of RULES that matches its name decides.

    Args:
        name: of a parameter, or of an array of the optimiser's that belongs to one, such as
            "params/encoder/stages/0/blocks/1/mlp/up/kernel/value".
        shape: of the array.
        fsdp: size of the mesh axis.
    """
    split = next(split for pattern, split in RULES if re.search(pattern, name))
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not split or fsdp == 1 or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def state_shardings(mesh: Mesh, state: Any) -> Any:  # noqa: ANN401 - any pytree
    """For each array of a pytree, where it lies, by RULES."""

    def sharding(path: jax.tree_util.KeyPath, array: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, array.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(sharding, state)
