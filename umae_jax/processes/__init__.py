"""Several processes that train together: how they find each other, meet, and watch each other."""

from collections.abc import Callable
from typing import Any

import jax

from umae_jax.files import AnyPath
from umae_jax.processes.lobby import Greeting, Lobby, RemoteError, difference, reach, versions
from umae_jax.processes.place import Place, find_place
from umae_jax.processes.watch import Processes

__all__ = ["Place", "Processes", "RemoteError", "difference", "find_place", "is_first", "join", "joined", "versions"]

_joined: Processes | None = None


def joined() -> Processes | None:
    """The processes that this one has joined."""
    return _joined


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return _joined is None or _joined.place.index == 0


def join(
    place: Place | None,
    doing: dict[str, Any],
    *,
    workdir: AnyPath | None = None,
    wait: int,
    silence: float,
    say: Callable[[str], None],
) -> None:
    """Meet the other processes, and connect their devices; nothing is done where there are none.

    Args:
        place: of this process; None if it is alone.
        doing: what it is about to do, by name; must be the same in all.
        workdir: the directory that all write to.
        wait: seconds to wait for the others.
        silence: seconds after which a process that says nothing is held to be gone.
        say: tells the user.

    Raises:
        UserError: if the others do not come, or are about to do something else.
        RemoteError: if process 0 tells that.
    """
    global _joined
    if place is None:
        return
    greeting = Greeting(place, {**versions(), **doing}, workdir)
    if place.index == 0:
        lines, port = Lobby(greeting, wait, say).gather(silence)
    else:
        line, port = reach(greeting, wait, silence, say)
        lines = {0: line}
    _joined = Processes(place, lines, silence)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `signals`
    jax.distributed.initialize(
        f"{place.host}:{port}",
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",  # the place is known
        initialization_timeout=wait,
        # Ours comes first: it can say what has happened.
        heartbeat_timeout_seconds=round(10 * silence) + 100,
    )
