"""How fast images are read, beside plain Pillow and by a training step.

The first two make the same crops of the same images, in turn. Images a second and core count the processor time that
this process spends, so that neither threads nor other programs blur the comparison.
"""

import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from umae_jax.benchmarking import steps
from umae_jax.config import check
from umae_jax.data.pipeline import TrainLoader, readers
from umae_jax.data.sources import Source, open_source
from umae_jax.data.transforms import random_crop, sample_rng
from umae_jax.errors import require
from umae_jax.training.loop import Clock
from umae_jax.training.sharding import batch_sharding, make_mesh

WARM = 2  # steps that are not timed
MIN_STEPS = 10


class Rate(NamedTuple):
    """Images a second of processor time, and of wall time."""

    per_core: float
    per_second: float


def measure(images: int, work: Callable[[], object]) -> Rate:
    """The rate at which `work` deals with its `images`."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Rate(images / (time.process_time() - processor), images / (time.perf_counter() - wall))


def plain_pillow(source: Source, config: ConfigDict, images: range) -> None:
    """Open, convert, resize from the crop box: what Pillow takes alone, one image after the other."""
    for number in images:
        try:
            image = Image.open(io.BytesIO(source[number % len(source)].data)).convert("RGB")
        except OSError:  # the loader skips it as well
            continue
        rng = sample_rng(config.seed, number)
        box = random_crop(rng, image.width, image.height, config.image_size, config.data.area)
        np.asarray(image.resize(config.image_size[::-1], Image.Resampling.BICUBIC, box))


def read_with_loader(source: Source, config: ConfigDict, images: range) -> None:
    """Read so many images and no more: nothing is read ahead at the other's expense."""
    loader = TrainLoader.of(
        config, source, batch_sharding(make_mesh()), first_sample=images.start, last_sample=images.stop
    )
    for batch in loader:
        jax.block_until_ready(batch)
    loader.close()


def compare(config: ConfigDict, images: int, rounds: int) -> dict[str, Any]:
    """Measure both.

    Args:
        config: whose data source and image size count.
        images: of a turn, rounded up to whole batches.
        rounds: how often each takes its turn, after a first one that does not count.

    Returns:
        The medians of each, and the least, median and most of their ratios.

    Raises:
        UserError: if there are no such images, or worker processes are to read them.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    config.batch_size, config.grad_accum_steps = 32 * jax.device_count(), 1  # what counts is the image
    check(config)
    require(not config.data.workers, "data.workers: the benchmark counts this process's time; set it to 0")
    config.data.workers = 0
    source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
    turn = -(-images // config.batch_size) * config.batch_size
    rates: dict[str, list[Rate]] = {"loader": [], "plain Pillow": []}
    for number in range(rounds + 1):
        numbers = range(number * turn, (number + 1) * turn)
        ours = measure(turn, partial(read_with_loader, source, config, numbers))
        plain = measure(turn, partial(plain_pillow, source, config, numbers))
        if number:
            rates["loader"].append(ours)
            rates["plain Pillow"].append(plain)
    ratios = [a.per_core / b.per_core for a, b in zip(*rates.values(), strict=True)]
    medians = {
        name: {field: round(statistics.median(getattr(rate, field) for rate in turns), 1) for field in Rate._fields}
        for name, turns in rates.items()
    }
    ratio = {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}
    threads = readers(config).threads
    return {"images": turn, "rounds": rounds, "source": len(source), "threads": threads, **medians, "ratio": ratio}


def feed(config: ConfigDict, images: int) -> dict[str, float]:
    """Train on what the loader reads, as a run does, and see how long the step waits for it.

    Args:
        config: what is trained, and its data.
        images: that are timed, rounded up to whole batches, after two steps that are not; but at least MIN_STEPS
            batches, as the first of them have been read beforehand.

    Returns:
        `images_per_second`, and `data_wait`, the fraction of the time that was spent waiting for images.

    Raises:
        UserError: if there are no such images, or the configuration's numbers do not fit together.
    """
    check(config)
    source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
    assembly, step, _, state = steps.prepare(config)
    loader = TrainLoader.of(config, source, batch_sharding(assembly.mesh))
    clock, pending = Clock(), None
    for number in range(WARM + max(MIN_STEPS, -(-images // config.batch_size))):
        if number == WARM:
            jax.block_until_ready(pending)
            clock.restart()
        state, metrics = step(state, clock.next(loader))
        clock.count(config.batch_size)
        jax.block_until_ready(pending)  # the step before, as the loop reads its metrics
        pending = metrics
    jax.block_until_ready(pending)
    loader.close()
    return clock.rates()


def table(result: dict[str, Any], config: ConfigDict) -> str:
    """What `compare` and `feed` found."""
    size = " x ".join(map(str, config.image_size))
    lines = [
        f"{result['source']} images of {config.data.source} to {size}, {result['rounds']} rounds of {result['images']}",
        f"{'':14}{'images/s/core':>16}{'images/s':>12}{'threads':>10}",
    ]
    for name, threads in (("loader", result["threads"]), ("plain Pillow", 1)):
        rate = result[name]
        lines.append(f"{name:14}{rate['per_core']:16.1f}{rate['per_second']:12.1f}{threads:10}")
    ratio = result["ratio"]
    told = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
    fed = result["with the step"]
    lines += [
        f"loader over plain Pillow, a core: {told}",
        f"with the step, {config.batch_size} images at a time: {fed['images_per_second']:.1f} images/s, "
        f"{fed['data_wait']:.1%} of the time waiting for images",
    ]
    return "\n".join(lines)
