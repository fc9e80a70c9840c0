"""Grain reads ahead; each process takes its share; what comes out are global sharded arrays.

`TrainLoader` is the endless stream of training, `EvalLoader` gives every image once.
"""

import functools
import itertools
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from umae_jax.data.augment import RandAugment
from umae_jax.data.sources import NO_LABEL, Source
from umae_jax.data.transforms import READ_TRIES, LoadCrop, LoadWhole, Sample, Unreadable
from umae_jax.errors import UserError, listing, require

# A run stops where more than this share of the reads fails, judged from this many samples on.
MAX_UNREADABLE = 0.5
JUDGE_AFTER = 16
CHUNK = 16  # samples, at most
# One process keeps about eight cores busy: of reading a photograph of 500 x 375 pixels to 256 x 256, 13 percent hold
# the interpreter's lock, 0.2 of 1.5 ms on a busy machine; the rest decodes, resizes, reads and copies into the
# batch. More cores need more processes. These leave to this one 0.16 ms an image to take over and to hand on, so some
# 6,000 images a second and host. Reasoned from two cores; not yet measured on many.
CORES_A_PROCESS = 8
THREADS_A_CORE = 2  # one decodes while the other waits for a file or the lock
CHUNKS_A_WORKER = 4  # that may lie in shared memory: being written, waiting, being read, and one to spare
SHARED_MEMORY = "/dev/shm"
SPARED = 60  # seconds that a worker outlives the signal to end


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


def abstract_batch(config: ConfigDict, batch_size: int, sharding: jax.sharding.Sharding) -> Batch:
    """Shapes, dtypes and sharding of a batch."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:  # noqa: ANN401 - a NumPy scalar type
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    image = array(np.uint8, *config.image_size, config.model.channels)
    return Batch(image, sample_index=array(np.uint32), label=array(np.int32), unreadable=array(np.int32))


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
    """A signal to all processes of a terminal or a job spares the workers for a while: who saves first needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SPARED))


def _join_samples(chunks: Sequence[Sequence[Sample]]) -> _Chunk:
    return _stack([*itertools.chain(*chunks)])


def _join_stacked(chunks: Sequence[_Chunk]) -> _Chunk:
    arrays, unreadable = zip(*chunks, strict=True)
    return _Chunk(Batch(*map(np.concatenate, zip(*arrays, strict=True))), tuple(itertools.chain(*unreadable)))


def _check_divides(batch_size: int) -> None:
    """Check that processes share a batch evenly.

    Raises:
        UserError: if it does not divide.
    """
    processes = jax.process_count()
    require(
        batch_size % processes == 0,
        f"batch_size: {batch_size} does not divide among {processes} processes; choose a multiple of {processes}",
    )


def _rows(batch_size: int, sharding: jax.sharding.Sharding) -> np.ndarray:
    """The places of a batch that the devices of this process hold, in order: what it reads."""
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = [np.arange(batch_size)[index] for index in held if index is not None]
    return np.unique(np.concatenate(rows))


class Readers(NamedTuple):
    """Who reads and decodes.

    Attributes:
        threads: in this process, or in each worker where there are workers.
        workers: processes beside this one.
    """

    threads: int
    workers: int


def host_cores() -> int:
    """Processor cores of this host that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readers(config: ConfigDict) -> Readers:
    """What `data.threads` and `data.workers` say; what they leave open is chosen by the cores of this host.

    Who says how many threads reads with these, without workers. Workers are no more than shared memory holds, which a
    container may have little of.
    """
    threads, workers = config.data.threads, config.data.workers
    cores = host_cores()
    if workers is None:
        workers = 0
        if threads is None and cores > CORES_A_PROCESS:
            chunk = CHUNK * math.prod(config.image_size) * config.model.channels
            there = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf
            workers = min(math.ceil(cores / CORES_A_PROCESS), there // (CHUNKS_A_WORKER * chunk))
    if threads is None:
        threads = THREADS_A_CORE * math.ceil(cores / max(1, workers))
    return Readers(threads, int(workers))


_drawing = threading.Lock()


@functools.lru_cache(maxsize=2)  # where an epoch ends, threads read from two
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's records: int32 [count]."""
    order = np.arange(count, dtype=np.int32)
    np.random.default_rng((seed, epoch, count)).shuffle(order)
    return order


@dataclass(frozen=True)
class _Share:
    """What this process reads of the endless, shuffled stream: of every batch, these rows.

    Every epoch has an order of its own, drawn at once, which takes less time than Grain's shuffle: that computes place
    after place, 90 microseconds each where a source is small. A process keeps two orders, 8 bytes a record together.
    """

    load: LoadCrop
    first_sample: int
    batch_size: int
    rows: np.ndarray

    def __call__(self, place: int) -> Sample:
        batch, row = divmod(place, len(self.rows))
        index = self.first_sample + batch * self.batch_size + int(self.rows[row])
        count = len(self.load.source)
        epoch, number = divmod(index, count)
        with _drawing:  # one of the threads draws, the others wait
            order = _permutation(self.load.seed, epoch, count)
        return self.load(index, int(order[number]))


def _read_chunk(read: Callable[[int], Sample], size: int, number: int) -> list[Sample]:
    return [read(place) for place in range(number * size, (number + 1) * size)]


def _read(
    read: Callable[[int], Sample], count: int, local: int, threads: int, workers: int
) -> grain.DatasetIterator[_Chunk]:
    """Samples 0 to `count` of this process, in order, as batches of `local`, read ahead by threads or by workers."""
    # Threads and workers take chunks, large enough to be worth handing over, small enough that two batches read ahead
    # are all that memory holds. They come back in order, so that batches do not depend on who read them.
    chunk = math.gcd(local, CHUNK)
    ahead = 2 * local // chunk // max(1, workers)
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + ahead)
    chunks = grain.MapDataset.range(count // chunk).map(functools.partial(_read_chunk, read, chunk))
    if not workers:  # pixels are copied once, into the batch
        return iter(chunks.to_iter_dataset(reading).batch(local // chunk, batch_fn=_join_samples, drop_remainder=True))
    if not flags.FLAGS.is_parsed():  # a notebook or a test; the workers read Grain's flags
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers)
    stacked = chunks.map(_stack).to_iter_dataset(reading).mp_prefetch(options, worker_init_fn=_init_worker)
    return iter(stacked.batch(local // chunk, batch_fn=_join_stacked, drop_remainder=True))


def _name(unreadable: Sequence[Unreadable], named: set[str]) -> None:
    """Warn of each record that cannot be read, once."""
    for record in unreadable:
        if record.name not in named:
            named.add(record.name)
            logging.warning("skipped an image that cannot be read: %s (%s)", record.name, record.reason)


def _to_devices(batch: Batch, sharding: jax.sharding.Sharding) -> Batch:
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)


class TrainLoader:
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
        augment: what is done to the crop.
        classes: labels lie below; None where labels do not matter.
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
        augment: RandAugment | None = None,
        classes: int | None = None,
        threads: int,
        workers: int = 0,
    ) -> None:
        _check_divides(batch_size)
        rows = _rows(batch_size, sharding)
        load = LoadCrop(source, seed, size, channels, area, augment)
        batches = sys.maxsize if last_sample is None else (last_sample - first_sample) // batch_size
        count = min(batches * len(rows), sys.maxsize)
        self._batches = _read(_Share(load, first_sample, batch_size, rows), count, len(rows), threads, workers)
        self._sharding = sharding
        self._classes = classes
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
    ) -> "TrainLoader":
        """The loader that a configuration describes."""
        augment = RandAugment(
            config.augment.operations,
            config.augment.magnitude,
            config.augment.magnitude_std,
            tuple(round(255 * mean) for mean in config.data.mean),
        )
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
            augment=augment if augment.operations else None,
            classes=config.model.classes if config.model.method == "classifier" else None,
            **readers(config)._asdict(),
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
        _name(unreadable, self._named)
        gave_up = bool((batch.unreadable >= READ_TRIES).any())
        mostly = self._samples >= JUDGE_AFTER and self._failures > MAX_UNREADABLE * (self._samples + self._failures)
        if gave_up or mostly:
            raise UserError(
                f"data.source: {self._failures} of {self._samples + self._failures} reads failed; "
                f"repair or remove the files, among them {listing(sorted(self._named), 3)}"
            )
        if self._classes is not None:
            check_labels(batch.label, self._classes, "data.source")
        return _to_devices(batch, self._sharding)


def check_labels(labels: np.ndarray, classes: int, key: str) -> None:
    """Check that labels [B] lie in 0 .. classes - 1.

    Raises:
        UserError: naming one that does not.
    """
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        what = "no label" if wrong[0] == NO_LABEL else f"the label {wrong[0]}"
        raise UserError(
            f"{key}: an image has {what}, labels must lie in 0..{classes - 1}; "
            "name a split or folder whose images are all labelled so"
        )


class EvalLoader:
    """Every image of a source once, whole, in batches of one size.

    The last batch is filled up with blanks. These, and images that cannot be read, have the label NO_LABEL.

    Args:
        source: the images, all of them labelled.
        key: of the configuration, that the source was named with.
        classes: labels lie below.
        images: take so many, drawn by the seed, where there are more; None for all.
        named: names of images that cannot be read, which are not named again; this pass adds its own.
        share: of the shorter side that the central crop keeps.
        batch_size, sharding, seed, size, channels, threads, workers: as in `TrainLoader`.
    """

    def __init__(
        self,
        source: Source,
        *,
        key: str,
        classes: int,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        size: tuple[int, int],
        channels: int = 3,
        share: float = 1.0,
        images: int | None = None,
        named: set[str] | None = None,
        seed: int = 0,
        threads: int,
        workers: int = 0,
    ) -> None:
        self.named = set() if named is None else named
        self._key, self._classes, self._sharding = key, classes, sharding
        _check_divides(batch_size)
        rows = _rows(batch_size, sharding)
        records = np.arange(len(source))
        if images is not None and images < len(source):
            records = np.sort(np.random.default_rng(seed).permutation(records)[:images])
        records = np.pad(records, (0, -len(records) % batch_size), constant_values=-1)
        self._records = records.reshape(-1, batch_size)[:, rows].ravel()
        load = LoadWhole(source, size, channels, share, self._records)
        self._batches = _read(load, len(self._records), len(rows), threads, workers)
        self._local = len(rows)

    @classmethod
    def of(
        cls,
        config: ConfigDict,
        source: Source,
        key: str,
        sharding: jax.sharding.Sharding,
        *,
        batch_size: int,
        images: int | None = None,
        named: set[str] | None = None,
    ) -> "EvalLoader":
        """The pass that a configuration describes; see the class."""
        return cls(
            source,
            key=key,
            classes=len(source.classes),
            batch_size=batch_size,
            sharding=sharding,
            size=config.image_size,
            channels=config.model.channels,
            share=config.validation.crop,
            images=images,
            named=named,
            seed=config.seed,
            **readers(config)._asdict(),
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches; the transfer of each to the devices goes on after it is given.

        Raises:
            UserError: if an image has no label, or one out of range.
        """
        try:
            for number, (batch, unreadable) in enumerate(self._batches):
                _name(unreadable, self.named)
                there = self._records[number * self._local : (number + 1) * self._local] >= 0
                check_labels(batch.label[there & (batch.unreadable == 0)], self._classes, self._key)
                yield _to_devices(batch, self._sharding)
        finally:
            self._batches.close()
