"""Where the time of a step goes, by JAX's profiler."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

from umae_jax.planning.compiled import scopes_of_operations


def measure(take: Callable[[int], None], program: str, steps: int) -> Counter[str]:
    """Nanoseconds of a step by scope, summed over devices and threads; empty if the profiler tells of no operation.

    An operation without a scope of its own is under "".

    Args:
        take: so many steps; returns when they are done.
        program: the text of the compiled step, which says what scope an operation is of.
        steps: to take under the profiler, after one that is not.
    """
    scopes = scopes_of_operations(program)
    take(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            take(steps)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    total: Counter[str] = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name in scopes:
                    total[scopes[name]] += event.duration_ns
    return Counter({scope: round(spent / steps) for scope, spent in total.items()})
