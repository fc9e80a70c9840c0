"""Search for the largest batch that fits in memory, with few compilations."""

import math
from collections.abc import Callable, Mapping

STEP = 8  # images per chip; only multiples are tried
MAX_BATCH = 1 << 15  # images per chip; the search stops there


def find_max_batch(
    required_memory: Callable[[int], float], memory: float, start: int, known: Mapping[int, float]
) -> int:
    """Return the largest batch per chip that fits, to within an eighth; 0 if not even STEP images fit.

    Memory is roughly linear in the batch: the search extrapolates from the last two batches to where memory ends, then
    tries a batch an eighth larger to confirm.

    Args:
        required_memory: compiles for so many images per chip and returns the bytes needed; infinite if unknown.
        memory: of a chip, bytes.
        start: images per chip to try first.
        known: bytes needed by batches that need no compilation, with an estimate for 0 images.
    """
    # Near the limit XLA saves memory, and needs less than it reports for batches that do not fit.
    required = dict(known)

    def fits(batch: int) -> bool:
        if batch not in required:
            required[batch] = required_memory(batch)
        return required[batch] <= memory

    def extrapolate(first: int, second: int) -> float:
        """Return the batch where memory ends on the line through two batches; their mean if there is no such line."""
        slope = (required[second] - required[first]) / (second - first)
        return first + (memory - required[first]) / slope if 0 < slope < math.inf else (first + second) / 2

    low, high = 0, MAX_BATCH + STEP  # the largest that fits, the smallest that does not
    batch = max(STEP, min(start, MAX_BATCH) // STEP * STEP)
    while True:
        if fits(batch):
            low = batch
        else:
            high = batch
        next_batch = low + max(STEP, low // 8 // STEP * STEP)
        if high <= next_batch:
            return low
        if high > MAX_BATCH:
            below = max(other for other in required if other < low)
            batch = max(next_batch, int(extrapolate(below, low)))
        else:
            quarter = (high - low) // 4
            batch = min(max(int(extrapolate(low, high)), low + quarter), high - quarter)
        batch = min(max(batch // STEP * STEP, low + STEP), high - STEP)
