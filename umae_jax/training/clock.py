"""Speed of a run."""

import time
from collections.abc import Iterator

from umae_jax.training.task import Batch


class Clock:
    """Measures images per second, and the fraction of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start anew."""
        self._start, self._images, self._waited = time.monotonic(), 0, 0.0

    def next(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, counting the time as waiting."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def count(self, images: int) -> None:
        """Add trained images."""
        self._images += images

    def rates(self) -> dict[str, float]:
        """Return `images_per_second` and `data_wait`, and start anew."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = {"images_per_second": self._images / seconds, "data_wait": min(1.0, self._waited / seconds)}
        self.restart()
        return rates
