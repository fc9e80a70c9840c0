"""Plans and growth of the cost, as the command `plan` prints them."""

import dataclasses
import json
from collections.abc import Sequence

from ml_collections import ConfigDict

from umae_jax import console
from umae_jax.files import locate_local, write_atomic
from umae_jax.planning import growth, growth_report
from umae_jax.planning.assembly import count_images
from umae_jax.planning.flops import count_flops, matmul_flops_by_scope
from umae_jax.planning.plan import make_plan, part_tables, table
from umae_jax.planning.targets import Target
from umae_jax.training.metrics import duration


def resolve_num_images(config: ConfigDict, given: int | None) -> int:
    """Return the images per epoch: --num_images, else those of the data, else those that the task assumes."""
    count, found = count_images(config)  # also completes the configuration
    num_images = given or count
    if not found:
        console.say(f"{config.data.source} is not on this machine: assuming {num_images:,} images (see --num_images)")
    return num_images


def print_plans(
    config: ConfigDict, targets: Sequence[Target], num_images: int, *, search: bool, parts: bool, as_json: bool
) -> None:
    """Plan for each target and print the results.

    Args:
        config: of the run.
        targets: TPU slices or local devices.
        num_images: images per epoch.
        search: search for the largest batch that fits.
        parts: print cycles, FLOPs and bytes by part of the model.
        as_json: print JSON instead of tables.
    """
    flops = count_flops(config)
    matmul_flops = matmul_flops_by_scope(config) if parts else {}
    plans = []
    for target in targets:
        console.say(f"{target.name}: compiling; large models take minutes")
        plans.append(make_plan(config, target, num_images, flops, matmul_flops, console.say, search=search))
        console.say(f"{target.name}: compiled in {duration(plans[-1].compile_seconds)}")
    if as_json:
        console.result(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2))
        return
    console.result(table(plans))
    if parts:
        for plan, target in zip(plans, targets, strict=True):
            console.result(part_tables(plan, target))


def print_growth(config: ConfigDict, targets: Sequence[Target], name: str) -> None:
    """Compile variants of the configuration, write growth.json and growth.png to a folder, and print a table."""
    folder = locate_local(name, "--growth")
    variants = growth.make_variants(config, targets, console.say)
    points = growth.measure(variants, folder / "costs", console.say)
    write_atomic(folder / "growth.json", growth.to_json(points).encode())
    title = f"{config.model.encoder}, {config.model.method}: around {variants[0]}"
    growth_report.draw(points, title, folder / "growth.png")
    console.result(growth_report.table(points))
    console.say(f"wrote {folder / 'growth.png'}")
