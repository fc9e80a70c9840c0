"""Time of a step by scope, measured by JAX's profiler."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

from umae_jax.planning.hlo import scopes_by_operation


def profile_scopes(run_steps: Callable[[int], None], program: str, num_steps: int) -> Counter[str]:
    """Return the nanoseconds per step by scope, summed over devices and threads.

    Operations without a scope are counted under "". Empty if the profiler records no operations on this platform.

    Args:
        run_steps: runs so many steps and returns when they are done.
        program: text of the compiled step, which maps operations to scopes.
        num_steps: to profile, after one that is not.
    """
    scopes = scopes_by_operation(program)
    run_steps(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run_steps(num_steps)
        (path,) = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(path))
    total: Counter[str] = Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation in scopes:
                    total[scopes[operation]] += event.duration_ns
    return Counter({scope: round(nanoseconds / num_steps) for scope, nanoseconds in total.items()})
