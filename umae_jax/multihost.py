"""Agreement among the processes of a run."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def all_gather_json(value: Any) -> list[Any]:  # noqa: ANN401 - any JSON value
    """Return the values of all processes, by process index; every process must call it, in the same order."""
    if jax.process_count() == 1:
        return [value]
    data = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    padded = np.frombuffer(data.ljust(longest), np.uint8)  # JSON may end in blanks
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def broadcast_json(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return process 0's value; every process must call it, in the same order."""
    return all_gather_json(value)[0]
