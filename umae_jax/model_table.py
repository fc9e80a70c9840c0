"""List the preset models: parameters, encoder tokens, and GFLOPs per image at the paper's image size.

    python -m umae_jax.models [SIZE ...]

GFLOPs are those of the forward pass of one image in float32, by XLA's count, in which a multiply-add is two: masking,
encoder, decoder and loss, or a classifier's encoder and head.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from umae_jax import cli, console
from umae_jax.api import list_models
from umae_jax.config import METHODS, default_config
from umae_jax.errors import require

COUNTS = Path(__file__).with_name("models") / "counts.json"  # generated
COLUMNS = ("size", "method", "image", "parameters", "tokens", "GFLOPs per image")
ROW = "{:<11} {:<11} {:>9} {:>12} {:>7} {:>16}"


class Counts(NamedTuple):
    """Counts of a preset."""

    parameters: int  # of the whole model, as a run trains it
    tokens: int  # that the encoder's first stage processes per image
    flops: int  # of the forward pass of one image


def stored_counts() -> dict[tuple[str, str], Counts]:
    """Return the counts of every preset but detectors, whose images have many sizes, by size and method."""
    read = json.loads(COUNTS.read_text())
    return {(size, method): Counts(**counts) for name, counts in read.items() for size, method in [name.split()]}


def describe(size: str, method: str, counts: Counts) -> tuple[str, ...]:
    """Return the row of a model, in the order of COLUMNS."""
    image = "{} x {}".format(*default_config(size, method).image_size)
    return size, method, image, f"{counts.parameters:,}", f"{counts.tokens:,}", f"{counts.flops / 1e9:.2f}"


def main(*sizes: str) -> None:
    """Print the methods, and the table row by row."""
    models = list_models()
    unknown = [size for size in sizes if size not in models]
    require(not unknown, f"there is no size {', '.join(unknown)}; choose {', '.join(models)}")
    for name, method in METHODS.items():
        console.result(f"{name:<11} {method.summary}")
    console.result(f"\n{ROW.format(*COLUMNS)}")
    counts = stored_counts()
    for size in sizes or models:
        for name in (name for name in models[size] if (size, name) in counts):
            console.result(ROW.format(*describe(size, name, counts[size, name])))


if __name__ == "__main__":
    cli.run(main, arguments=len(sys.argv), compiles=False)
