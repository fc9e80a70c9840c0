"""What processes that train together must decide alike: each computes its part of every step, or all of them hang."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from umae_jax.signals import PreemptionRequested, StopSignals
from umae_jax.training.sharding import batch_sharding, replicated


def all_gather_json(value: Any) -> list[Any]:  # noqa: ANN401 - whatever JSON holds
    """What each process gave, by its index, in all processes; all must call it, in the same order."""
    if jax.process_count() == 1:
        return [value]
    data = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    padded = np.frombuffer(data.ljust(longest), np.uint8)  # JSON may end in blanks
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def broadcast_json(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """What process 0 gave, in all processes; all must call it, in the same order."""
    return all_gather_json(value)[0]


class AgreedStop:
    """Whether to leave, asked by all processes at the same steps, and answered alike.

    A signal may reach one process alone, in the middle of anything. So each asks all devices, and takes the answer to
    the question before, which is there: nobody waits, and all leave after the same step, one later than a single
    process would.

    Args:
        signals: of this process.
        mesh: all devices.
    """

    def __init__(self, signals: StopSignals, mesh: Mesh) -> None:
        self._signals = signals
        self._alone = jax.process_count() == 1
        self._received: int | None = None
        if not self._alone:
            self._sharding = batch_sharding(mesh)
            self._most = jax.jit(jnp.max, out_shardings=replicated(mesh))
            self._asked = self._ask()

    def _ask(self) -> jax.Array:
        here = np.full(jax.local_device_count(), self._signals.received or 0, np.int32)
        return self._most(jax.make_array_from_process_local_data(self._sharding, here))

    @property
    def received(self) -> int | None:
        """The signal's number that the last answer told, or None."""
        return self._signals.received if self._alone else self._received

    def ask(self) -> int | None:
        """The number of a signal that some process has received, or None."""
        if not self._alone and self._received is None:
            before, self._asked = self._asked, self._ask()
            self._received = int(jax.device_get(before)) or None
        return self.received

    def check(self) -> None:
        """Raise PreemptionRequested if a signal has come; for use in what takes long between two steps."""
        if self.ask() is not None:
            raise PreemptionRequested
