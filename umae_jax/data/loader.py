"""Grain reads, shuffles and prefetches; each process takes its share; what comes out are global sharded arrays."""

import itertools
import math
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from umae_jax.data.sources import Source
from umae_jax.data.transforms import READ_TRIES, LoadCrop, Sample, Unreadable
from umae_jax.errors import UserError, listing, require

# A run stops where more than this share of the reads fails, judged from this many samples on.
MOST_UNREADABLE = 0.5
JUDGE_AFTER = 16
CHUNK = 16  # samples, at most


class Batch(NamedTuple):
    """A global batch, sharded over its first axis.

    Attributes:
        image: uint8 [B, H, W, C].
        sample_index: uint32 [B], global.
        label: int32 [B].
        unreadable: int32 [B], how many records each sample had to skip.
    """

    image: Any
    sample_index: Any
    label: Any
    unreadable: Any


class _Chunk(NamedTuple):
    """Consecutive samples of this process, on the host."""

    arrays: Batch
    unreadable: tuple[Unreadable, ...]


def _stack(samples: Sequence[Sample]) -> _Chunk:
    images, indices, labels, unreadable = zip(*samples, strict=True)
    counts = np.array([len(records) for records in unreadable], np.int32)
    arrays = Batch(np.stack(images), np.stack(indices), np.stack(labels), counts)
    return _Chunk(arrays, tuple(itertools.chain(*unreadable)))


def _init_worker(_index: int, _count: int) -> None:
    """A Ctrl-C reaches every process of the terminal; the workers leave it to the one that saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _join(chunks: Sequence[_Chunk]) -> _Chunk:
    arrays, unreadable = zip(*chunks, strict=True)
    return _Chunk(Batch(*map(np.concatenate, zip(*arrays, strict=True))), tuple(itertools.chain(*unreadable)))


class Loader:
    """An endless stream of training batches.

    Sample i of a run is the same image with the same crop whatever the number of processes, workers or devices, so
    the whole state of the stream is one number: how many samples have been seen.

    Args:
        source: the images.
        batch_size: global.
        sharding: of a batch, over its first axis.
        seed: of the shuffle and of the crops.
        first_sample: index of the first sample to give, the number seen before.
        last_sample: where to end, with a whole batch; None for a stream without end.
        size: height and width in pixels.
        channels: 3, or 1 for grayscale.
        area: the smallest share of an image that a crop keeps.
        threads: that read and decode, in this process or in each worker.
        workers: processes that read and decode; 0 for threads alone.

    Raises:
        UserError: on reading, if most records cannot be read.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        seed: int,
        first_sample: int = 0,
        last_sample: int | None = None,
        size: tuple[int, int],
        channels: int = 3,
        area: float,
        threads: int,
        workers: int = 0,
    ) -> None:
        processes = jax.process_count()
        require(
            batch_size % processes == 0,
            f"batch_size: {batch_size} does not divide among {processes} processes; choose a multiple of {processes}",
        )
        local = batch_size // processes
        load = LoadCrop(source, seed, size, channels, area)
        samples = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat().map_with_index(load)
        samples = samples[first_sample + jax.process_index() : last_sample : processes]
        # Threads and workers take chunks, large enough to be worth handing over, small enough that two batches read
        # ahead are all that memory holds. They come back in order, so that batches do not depend on who read them.
        chunk = math.gcd(local, CHUNK)
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2 * local // chunk)
        chunks = samples.batch(chunk, batch_fn=_stack).to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():  # a notebook or a test; the workers read Grain's flags
                flags.FLAGS.mark_as_parsed()
            chunks = chunks.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_init_worker)
        self._batches = iter(chunks.batch(local // chunk, batch_fn=_join, drop_remainder=True))
        self._sharding = sharding
        self._named: set[str] = set()
        self._samples = self._failures = 0

    @classmethod
    def of(
        cls,
        config: ConfigDict,
        source: Source,
        sharding: jax.sharding.Sharding,
        *,
        first_sample: int = 0,
        last_sample: int | None = None,
    ) -> "Loader":
        """The loader that a configuration describes."""
        return cls(
            source,
            batch_size=config.batch_size,
            sharding=sharding,
            seed=config.seed,
            first_sample=first_sample,
            last_sample=last_sample,
            size=config.image_size,
            channels=config.model.channels,
            area=config.data.area,
            threads=config.data.threads,
            workers=config.data.workers,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def close(self) -> None:
        """Stop reading ahead and end the workers."""
        self._batches.close()

    def __next__(self) -> Batch:
        """The next global batch; its transfer to the devices goes on after this returns."""
        batch, unreadable = next(self._batches)
        self._samples += len(batch.sample_index)
        self._failures += len(unreadable)
        for record in unreadable:
            if record.name not in self._named:
                self._named.add(record.name)
                logging.warning("skipped an image that cannot be read: %s (%s)", record.name, record.reason)
        gave_up = bool((batch.unreadable >= READ_TRIES).any())
        mostly = self._samples >= JUDGE_AFTER and self._failures > MOST_UNREADABLE * (self._samples + self._failures)
        if gave_up or mostly:
            raise UserError(
                f"data.source: {self._failures} of {self._samples + self._failures} reads failed; "
                f"repair or remove the files, among them {listing(sorted(self._named), 3)}"
            )
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(self._sharding, array), batch)
