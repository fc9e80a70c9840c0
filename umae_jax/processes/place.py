"""Where a process stands among those that train together: told by flags, or by Cloud TPU, SLURM and others."""

import dataclasses
import os
import warnings
from collections.abc import Sequence

from jax._src import clusters  # finds Cloud TPU pods, SLURM and others; public only inside jax.distributed.initialize

from umae_jax.errors import UserError, require

# In a Kubernetes pod that is no part of a job JAX finds no others, but warns or fails.
IN_A_JOB = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "SLURM_JOB_ID"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
        host, port: where process 0 listens.
        count: of processes.
        index: of this one.
        devices: of this host, that are this process's; None for all.
    """

    host: str
    port: int
    count: int
    index: int
    devices: Sequence[int] | None = None


def find_place(coordinator: str | None, count: int | None, index: int | None, wait: int) -> Place | None:
    """This process's place: as told, or as Cloud TPU, SLURM and others tell; None where it is alone.

    Args:
        coordinator: HOST:PORT of process 0.
        count: of processes.
        index: of this process.
        wait: seconds to look for the coordinator.

    Raises:
        UserError: if it is told by halves, or wrongly.
    """
    if count == 1:
        return None
    told = (coordinator, count, index)
    if told == (None, None, None):
        if "KUBERNETES_SERVICE_HOST" in os.environ and not IN_A_JOB & os.environ.keys():
            return None
        try:
            with warnings.catch_warnings(action="ignore"):
                found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, wait)
        except Exception as error:  # whatever a cluster's own ways of telling raise
            raise UserError(
                f"the other processes could not be found ({error}); name them by --coordinator, --processes and "
                "--process, or write --processes=1 to train alone"
            ) from None
        coordinator, count, index, devices = found
        if coordinator is None or count is None or index is None or count == 1:
            return None
    else:
        devices = None
    if coordinator is None or count is None or index is None:
        raise UserError("--coordinator, --processes and --process belong together; write all three, or none")
    host, _, port = coordinator.rpartition(":")
    require(
        bool(host) and port.isdecimal() and 0 < int(port) < 65536,
        f"--coordinator: {coordinator!r} is not HOST:PORT, such as 10.0.0.1:8476",
    )
    require(0 <= index < count, f"--process: {index} does not lie in 0..{count - 1}")
    return Place(host, int(port), count, index, devices)
