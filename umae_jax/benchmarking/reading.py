"""Speed of the data loader: compared with plain Pillow, and while it feeds a training step.

The loader and Pillow make the same crops of the same images, in turn. "Per core" means per second of this process's
CPU time, which neither threads nor other programs distort.
"""

import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from umae_jax.benchmarking.steps import compile_step, summarize
from umae_jax.config import check
from umae_jax.data.pipeline import TrainLoader, readers
from umae_jax.data.sources import Source, open_source
from umae_jax.data.transforms import random_crop, sample_rng
from umae_jax.errors import require
from umae_jax.tasks import make_task
from umae_jax.training.sharding import batch_sharding, make_mesh
from umae_jax.training.task import BaseTask

WARMUP_STEPS = 2
MIN_STEPS = 10


class Rate(NamedTuple):
    """Images per second of CPU time, and per second of wall time."""

    images_per_second_per_core: float
    images_per_second: float


def measure(num_images: int, work: Callable[[], object]) -> Rate:
    """Return the rate at which `work` processes its `num_images` images."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Rate(num_images / (time.process_time() - cpu), num_images / (time.perf_counter() - wall))


def read_with_pillow(source: Source, config: ConfigDict, samples: range) -> None:
    """Open, convert and resize each sample's crop with Pillow, in one thread."""
    for index in samples:
        try:
            image = Image.open(io.BytesIO(source[index % len(source)].data)).convert("RGB")
        except OSError:  # the loader skips it as well
            continue
        rng = sample_rng(config.seed, index)
        box = random_crop(rng, image.width, image.height, config.image_size, config.data.area)
        np.asarray(image.resize(config.image_size[::-1], Image.Resampling.BICUBIC, box))


def read_with_loader(task: BaseTask, samples: range) -> None:
    """Read exactly these samples: reading ahead would take time from the other contender."""
    loader = _make_loader(task, make_mesh(), samples.start, samples.stop)
    for batch in loader:
        jax.block_until_ready(batch)
    loader.close()


def _make_loader(task: BaseTask, mesh: Mesh, first_sample: int = 0, last_sample: int | None = None) -> TrainLoader:
    return TrainLoader(
        task.num_samples,
        task.sample_loader(),
        groups=task.groups,
        batch_size=task.config.batch_size,
        sharding=batch_sharding(mesh),
        seed=task.config.seed,
        first_sample=first_sample,
        last_sample=last_sample,
        readers=readers(task.config),
    )


def compare(config: ConfigDict, num_images: int, rounds: int) -> dict[str, Any]:
    """Measure the loader and plain Pillow in turn.

    Args:
        config: only its data source and image size matter.
        num_images: per turn, rounded up to whole batches.
        rounds: number of turns of each, after one that is not counted.

    Returns:
        The median rates of both, and the min, median and max of the ratio of their rates per core.

    Raises:
        UserError: if the images cannot be opened, or `data.workers` asks for worker processes.
    """
    config = config.copy_and_resolve_references().unlock()
    config.batch_size, config.grad_accum_steps = 32 * jax.device_count(), 1
    check(config)
    require(not config.data.workers, "data.workers: the benchmark measures this process's CPU time; set it to 0")
    config.data.workers = 0
    task = make_task(config)
    task.open()
    source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
    turn = -(-num_images // config.batch_size) * config.batch_size
    rates: dict[str, list[Rate]] = {"loader": [], "pillow": []}
    for number in range(rounds + 1):
        samples = range(number * turn, (number + 1) * turn)
        loader = measure(turn, partial(read_with_loader, task, samples))
        pillow = measure(turn, partial(read_with_pillow, source, config, samples))
        if number:
            rates["loader"].append(loader)
            rates["pillow"].append(pillow)
    pairs = zip(rates["loader"], rates["pillow"], strict=True)
    ratios = [loader.images_per_second_per_core / pillow.images_per_second_per_core for loader, pillow in pairs]
    medians = {
        name: {key: round(statistics.median(getattr(rate, key) for rate in turns), 1) for key in Rate._fields}
        for name, turns in rates.items()
    }
    return {
        "num_images": turn,
        "rounds": rounds,
        "source_size": len(source),
        "threads": readers(config).threads,
        **medians,
        "ratio": summarize(ratios),
    }


def feed(config: ConfigDict, num_images: int) -> dict[str, float]:
    """Train on the loader's batches, as a run does, and measure how long the step waits for them.

    Args:
        config: of the run.
        num_images: to time after WARMUP_STEPS, rounded up to whole batches and to MIN_STEPS: the loader has read the
            first batches ahead.

    Returns:
        `images_per_second`, and `data_wait`, the fraction of time spent waiting for images.

    Raises:
        UserError: if the images cannot be opened, or the configuration is inconsistent.
    """
    check(config)
    task = make_task(config)
    task.open()  # completes the configuration from the data
    built, compiled, _, state = compile_step(config)
    loader = _make_loader(task, built.mesh)
    num_steps = max(MIN_STEPS, -(-num_images // config.batch_size))
    pending, start, waited = None, 0.0, 0.0
    for number in range(WARMUP_STEPS + num_steps):
        if number == WARMUP_STEPS:
            jax.block_until_ready(pending)
            start, waited = time.perf_counter(), 0.0
        before = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - before
        state, metrics = compiled(state, batch)
        jax.block_until_ready(pending)  # of the step before, as the training loop does
        pending = metrics
    jax.block_until_ready(pending)
    seconds = time.perf_counter() - start
    loader.close()
    return {"images_per_second": num_steps * config.batch_size / seconds, "data_wait": waited / seconds}


def table(result: dict[str, Any], config: ConfigDict) -> str:
    """Format the results of `compare`, with those of `feed` under "with_step", as a table."""
    size = " x ".join(map(str, config.image_size))
    images = f"{result['source_size']} images of {config.data.source}"
    lines = [
        f"{images} to {size}, {result['rounds']} rounds of {result['num_images']}",
        f"{'':14}{'images/s/core':>16}{'images/s':>12}{'threads':>10}",
    ]
    for key, name, threads in (("loader", "loader", result["threads"]), ("pillow", "plain Pillow", 1)):
        rate = Rate(**result[key])
        lines.append(f"{name:14}{rate.images_per_second_per_core:16.1f}{rate.images_per_second:12.1f}{threads:10}")
    ratio, fed = result["ratio"], result["with_step"]
    lines += [
        f"loader over plain Pillow, per core: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"with the step, batches of {config.batch_size}: {fed['images_per_second']:.1f} images/s, "
        f"{fed['data_wait']:.1%} of the time waiting for images",
    ]
    return "\n".join(lines)
