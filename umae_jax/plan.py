"""Plan a run without its hardware: memory, speed, and the cost of the whole schedule.

    python -m umae_jax.plan --config configs/pretrain_swin_large.py --topology v5e:16x16 [--topology v6e:16x16 ...]

compiles the real training step for each TPU slice with the TPU compiler, on any x86-64 machine with Linux
(pip install "umae_jax[plan]"). Without --topology it compiles for the local devices.

    python -m umae_jax.plan --config CONFIG --topology v5e:2x2 --topology v5e:4x4 --growth FOLDER

instead shows how the cost of a step grows: with image size, depth and batch on the first slice, and with the number of
chips.
"""

import dataclasses
import json
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from umae_jax import cli, console
from umae_jax.config import check
from umae_jax.errors import require
from umae_jax.files import locate_local, write_atomic
from umae_jax.planning import growth, growth_report
from umae_jax.planning.assembly import IMAGENET_IMAGES, count_images
from umae_jax.planning.flops import count_flops, matmul_flops_by_scope
from umae_jax.planning.hardware import GPUS, parse_topology
from umae_jax.planning.plan import make_plan, part_tables, table
from umae_jax.planning.targets import Target, find_target, local_target
from umae_jax.training.metrics import duration

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_multi_string("topology", [], "TPU slice such as v5e:16x16, or a local GPU such as h100.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "Images per epoch, if the data are elsewhere.", lower_bound=1)
_LARGEST = flags.DEFINE_boolean("largest", True, "Search for the largest batch that fits; needs several compilations.")
_PARTS = flags.DEFINE_boolean("parts", False, "Print cycles, FLOPs and bytes by part of the model.")
_GROWTH = flags.DEFINE_string("growth", None, "Instead show how the cost grows: folder for growth.json and growth.png.")
_JSON = flags.DEFINE_boolean("json", False, "Print JSON instead of tables.")


def resolve_num_images(config: ConfigDict) -> int:
    """Return the images per epoch: --num_images, else those of the data, else those of ImageNet."""
    count = count_images(config)  # also completes the configuration
    num_images = _NUM_IMAGES.value or count or IMAGENET_IMAGES
    if count is None:
        console.say(f"{config.data.source} is not on this machine: assuming {num_images:,} images (see --num_images)")
    return num_images


def print_plans(config: ConfigDict, targets: Sequence[Target], num_images: int) -> None:
    """Plan for each target and print the results."""
    flops = count_flops(config)
    matmul_flops = matmul_flops_by_scope(config) if _PARTS.value else {}
    plans = []
    for target in targets:
        console.say(f"{target.name}: compiling; large models take minutes")
        plans.append(make_plan(config, target, num_images, flops, matmul_flops, console.say, search=_LARGEST.value))
        console.say(f"{target.name}: compiled in {duration(plans[-1].compile_seconds)}")
    if _JSON.value:
        console.result(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2))
        return
    console.result(table(plans))
    if _PARTS.value:
        for plan, target in zip(plans, targets, strict=True):
            console.result(part_tables(plan, target))


def print_growth(config: ConfigDict, targets: Sequence[Target], name: str) -> None:
    """Compile variants of the configuration, write growth.json and growth.png to a folder, and print a table."""
    require(not (_PARTS.value or _JSON.value), "--growth writes growth.json, parts included; omit --json and --parts")
    folder = locate_local(name, "--growth")
    variants = growth.make_variants(config, targets, console.say)
    points = growth.measure(variants, folder / "costs", console.say)
    write_atomic(folder / "growth.json", growth.to_json(points).encode())
    title = f"{config.model.encoder}, {config.model.method}: around {variants[0]}"
    growth_report.draw(points, title, folder / "growth.png")
    console.result(growth_report.table(points))
    console.say(f"wrote {folder / 'growth.png'}")


def main() -> None:
    """Plan for the topologies of the command line."""
    config = cli.read_config(_CONFIG)
    for name in _TOPOLOGY.value:
        if name.lower() not in GPUS:
            parse_topology(name)  # reject a wrong name before compiling
    num_images = resolve_num_images(config)
    targets = [find_target(name) for name in _TOPOLOGY.value] or [local_target()]
    if _GROWTH.value:
        print_growth(config, targets, _GROWTH.value)
        return
    for target in targets:
        check(config, len(target.devices))
    print_plans(config, targets, num_images)


if __name__ == "__main__":
    cli.run(main)
