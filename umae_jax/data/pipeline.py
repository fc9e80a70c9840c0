"""Read batches ahead with Grain, as global sharded arrays; each process reads its own rows of every batch.

`TrainLoader` is an endless, shuffled stream for training, `EvalLoader` a pass over all records. A batch is a
dictionary of the arrays that `load` returns, [B, ...]. Loaders return it while its transfer to the devices continues.
"""

import functools
import itertools
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from umae_jax.data.transforms import READ_TRIES, Sample, Unreadable
from umae_jax.data.workers import init_worker, start_resource_tracker
from umae_jax.errors import UserError, listing, require

MAX_UNREADABLE = 0.5  # maximum fraction of failed reads; a run with more stops
MIN_SAMPLES = 16  # samples that this process reads before it checks that fraction
CHUNK = 16  # max samples per work item of a thread or worker
# A process can use about eight cores: 13% of reading a 500 x 375 photograph at 256 x 256 (0.2 of 1.5 ms) holds the GIL.
# With workers, an image still costs this process 0.16 ms, which limits a host to about 6,000 images/s. Extrapolated
# from two cores.
CORES_PER_PROCESS = 8
THREADS_PER_CORE = 2  # one decodes while the other waits for a file or the GIL
CHUNKS_PER_WORKER = 4  # in shared memory: being written, queued, being read, and one to spare
SHARED_MEMORY = "/dev/shm"

LoadTrain = Callable[[int, int], Sample]  # from sample index and record index
LoadEval = Callable[[int], Sample]  # from record index; -1 returns a blank


def abstract_batch(
    arrays: Mapping[str, jax.ShapeDtypeStruct], batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a batch's shapes, dtypes and sharding, given those of one sample without its batch axis."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape), array.dtype, sharding=sharding)
        for name, array in arrays.items()
    }


class Readers(NamedTuple):
    """The numbers of reading threads per process, and of worker processes; with 0 workers this process reads."""

    threads: int
    workers: int = 0


def host_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readers(config: ConfigDict, sample_bytes: int | None = None) -> Readers:
    """Return `data.threads` and `data.workers`; choose those that are None by the number of this host's cores.

    If only `data.threads` is set, there are no workers. The number of workers is limited by free shared memory, which
    is small in some containers; `sample_bytes` are those of a sample, None for an image alone.
    """
    threads, workers = config.data.threads, config.data.workers
    cores = host_cores()
    if workers is None:
        workers = 0
        if threads is None and cores > CORES_PER_PROCESS:
            chunk_bytes = CHUNK * (sample_bytes or math.prod(config.image_size) * config.model.channels)
            free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf
            workers = int(min(math.ceil(cores / CORES_PER_PROCESS), free // (CHUNKS_PER_WORKER * chunk_bytes)))
    if threads is None:
        threads = THREADS_PER_CORE * math.ceil(cores / max(1, workers))
    return Readers(threads, workers)


class _Rows(NamedTuple):
    """Consecutive samples of this process: arrays [rows, ...], and the unreadable records of each sample."""

    arrays: dict[str, np.ndarray]
    unreadable: tuple[tuple[Unreadable, ...], ...]


def _concatenate(chunks: Sequence[Sequence[_Rows]]) -> _Rows:
    parts = [*itertools.chain.from_iterable(chunks)]
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return _Rows(arrays, tuple(itertools.chain.from_iterable(part.unreadable for part in parts)))


def _read_chunk(
    read: Callable[[int], Sample], indices: Sequence[int] | np.ndarray, size: int, concatenate: bool, chunk: int
) -> list[_Rows]:
    samples = map(read, map(int, indices[chunk * size : (chunk + 1) * size]))
    rows = [_Rows({name: array[None] for name, array in arrays.items()}, (bad,)) for arrays, bad in samples]
    return [_concatenate([rows])] if concatenate else rows


def _read_ahead(
    read: Callable[[int], Sample], indices: Sequence[int] | np.ndarray, rows: int, readers: Readers
) -> grain.DatasetIterator[_Rows]:
    """Read this process's samples in the order of `indices`, `rows` per batch, by threads or by workers."""
    # Chunks are large enough to amortise passing them on, and small enough to read little more than two batches ahead.
    # They arrive in order, so batches do not depend on which thread or worker read them.
    threads, workers = readers
    size = math.gcd(rows, CHUNK)
    options = grain.ReadOptions(threads, prefetch_buffer_size=threads + 2 * rows // size // max(1, workers))
    # A worker concatenates its chunks for shared memory. Threads do not, so pixels are copied once, into the batch.
    read_chunk = functools.partial(_read_chunk, read, indices, size, workers > 0)
    chunks = grain.MapDataset.range(len(indices) // size).map(read_chunk).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # in a notebook or a test; Grain's workers read its flags
            flags.FLAGS.mark_as_parsed()
        start_resource_tracker()
        chunks = chunks.mp_prefetch(grain.MultiprocessingOptions(workers), worker_init_fn=init_worker)
    return iter(chunks.batch(rows // size, batch_fn=_concatenate, drop_remainder=True))


def _process_rows(batch_size: int, sharding: jax.sharding.Sharding) -> np.ndarray:
    """Return the rows of a batch that this process's devices hold, ascending."""
    processes = jax.process_count()
    message = f"batch_size: {batch_size} does not divide among {processes} processes; choose a multiple of {processes}"
    require(batch_size % processes == 0, message)
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices if index is not None]))


def _warn_once(unreadable: Sequence[tuple[Unreadable, ...]], named: set[str]) -> None:
    for name, reason in itertools.chain.from_iterable(unreadable):
        if name not in named:
            named.add(name)
            logging.warning("skipped an image that cannot be read: %s (%s)", name, reason)


_permutation_lock = threading.Lock()  # one thread draws while the others wait


class Groups(NamedTuple):
    """Records in groups: a batch holds records of one group, such as images of one orientation."""

    of_record: bytes  # the number of each record's group; bytes are hashed once
    batch_size: int  # global

    def samples_per_epoch(self) -> int:
        """Return the samples of an epoch: the last batch of each group repeats some of its records."""
        sizes = np.bincount(np.frombuffer(self.of_record, np.uint8))
        return int((-(-sizes // self.batch_size)).sum()) * self.batch_size


@functools.lru_cache(maxsize=2)  # at the end of an epoch, threads read from two
def _permutation(seed: int, epoch: int, size: int, groups: Groups | None) -> np.ndarray:
    """Draw the records of an epoch, int32 [size]; Grain's shuffle is slower, as it computes each index."""
    order = np.arange(len(groups.of_record) if groups else size, dtype=np.int32)
    rng = np.random.default_rng((seed, epoch, size))
    rng.shuffle(order)
    if groups is None:
        return order
    group = np.frombuffer(groups.of_record, np.uint8)[order]
    members = [order[group == number] for number in np.unique(group)]
    rows = [-(-len(records) // groups.batch_size) for records in members]
    shape = (-1, groups.batch_size)
    batches = [
        np.resize(one, count * groups.batch_size).reshape(shape) for one, count in zip(members, rows, strict=True)
    ]
    ordered = np.concatenate(batches)
    rng.shuffle(ordered)  # its rows
    return ordered.ravel()


def _read_shuffled(
    load: LoadTrain,
    source_size: int,
    groups: Groups | None,
    seed: int,
    first_sample: int,
    batch_size: int,
    rows: np.ndarray,
    number: int,
) -> Sample:
    """Read sample `number` of this process, which takes `rows` of every batch of the endless, shuffled stream."""
    batch, row = divmod(number, len(rows))
    sample_index = first_sample + batch * batch_size + int(rows[row])
    epoch, position = divmod(sample_index, source_size)
    with _permutation_lock:
        order = _permutation(seed, epoch, source_size, groups)
    arrays, unreadable = load(sample_index, int(order[position]))
    return Sample({**arrays, "sample_index": np.array(sample_index, np.uint32)}, unreadable)


class TrainLoader:
    """An endless iterator of training batches: the arrays of `load`, and `sample_index`, uint32 [B].

    Sample i of a run is the same record with the same random draws on any number of processes, workers and devices. So
    the stream's only state is the number of samples read before. A UserError says that processes cannot share a batch
    evenly, or, while reading, that most records cannot be read.

    Args:
        source_size: number of samples per epoch: of records, or of `groups`.
        load: returns a sample, given its index and the index of its record; must be picklable. The arrays of a batch
            have one shape; batches may differ.
        groups: of the records; None: a batch may hold any records.
        batch_size: global.
        sharding: of a batch, over its first axis.
        seed: of the shuffle.
        first_sample: index of the first sample, which is the number of samples read before.
        last_sample: index at which the stream ends, after a whole batch; None for an endless stream.

    Attributes:
        skipped_images: unreadable records of this process, up to the last batch returned.
    """

    def __init__(
        self,
        source_size: int,
        load: LoadTrain,
        *,
        groups: Groups | None = None,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        seed: int,
        first_sample: int = 0,
        last_sample: int | None = None,
        readers: Readers,
    ) -> None:
        rows = _process_rows(batch_size, sharding)
        batches = sys.maxsize if last_sample is None else (last_sample - first_sample) // batch_size
        read = functools.partial(_read_shuffled, load, source_size, groups, seed, first_sample, batch_size, rows)
        self._batches = _read_ahead(read, range(min(batches * len(rows), sys.maxsize)), len(rows), readers)
        self._sharding = sharding
        self._named: set[str] = set()
        self._samples = 0
        self.skipped_images = 0

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        arrays, unreadable = next(self._batches)
        _warn_once(unreadable, self._named)
        failures = [len(records) for records in unreadable]
        self._samples += len(failures)
        self.skipped_images += sum(failures)
        reads = self._samples + self.skipped_images
        mostly_failed = self._samples >= MIN_SAMPLES and self.skipped_images > MAX_UNREADABLE * reads
        if mostly_failed or max(failures) >= READ_TRIES:
            files = f"repair or remove the files, among them {listing(sorted(self._named), 3)}"
            raise UserError(f"data.source: {self.skipped_images} of {reads} reads failed; {files}")
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self._sharding), arrays)

    def close(self) -> None:
        """Stop reading ahead and end the workers."""
        self._batches.close()


class EvalLoader:
    """An iterable over batches of all records in order: the arrays of `load`, and `valid`, bool [B].

    `valid` is False for unreadable records and for the blanks that fill the last batch. Each iteration is a new pass.

    Args:
        source_size, batch_size, sharding: as for `TrainLoader`, with the same UserError.
        load: returns a sample, given the index of its record, and a blank one for -1; must be picklable.
        images: number of records to draw from the source; None for all.
        seed: of that draw.
        named: unreadable records that have been reported, by name; each pass adds to it.
    """

    def __init__(
        self,
        source_size: int,
        load: LoadEval,
        *,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        images: int | None = None,
        seed: int = 0,
        named: set[str] | None = None,
        readers: Readers,
    ) -> None:
        rows = _process_rows(batch_size, sharding)
        records = np.arange(source_size)
        if images is not None and images < source_size:
            records = np.sort(np.random.default_rng(seed).permutation(records)[:images])
        records = np.pad(records, (0, -len(records) % batch_size), constant_values=-1)
        self._records = records.reshape(-1, batch_size)[:, rows]  # [batches, rows]
        self._load, self._sharding, self._readers = load, sharding, readers
        self._named = set() if named is None else named

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        to_devices = functools.partial(jax.make_array_from_process_local_data, self._sharding)
        batches = _read_ahead(self._load, self._records.ravel(), self._records.shape[1], self._readers)
        try:
            for records, (arrays, unreadable) in zip(self._records, batches, strict=True):
                _warn_once(unreadable, self._named)
                valid = (records >= 0) & ~np.array([*map(bool, unreadable)])
                yield jax.tree.map(to_devices, {**arrays, "valid": valid})
        finally:
            batches.close()
