"""Annotated images for training and evaluation of detectors."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.console import say
from umae_jax.data.annotations import AnnotatedSource, open_annotated
from umae_jax.data.dense_transforms import (
    IGNORED,
    LoadForDetection,
    LoadViews,
    blank_arrays,
    read_semantic,
    semantic_name,
    view_names,
)
from umae_jax.data.pipeline import EvalLoader, abstract_batch, readers
from umae_jax.data.placement import Size, oriented
from umae_jax.errors import UserError, printable, require
from umae_jax.files import first_line
from umae_jax.models.pyramid import STRIDES
from umae_jax.training.memory import tree_bytes
from umae_jax.training.sharding import batch_sharding
from umae_jax.training.task import Batch

MAX_BATCH = 8  # images per device in evaluation; they are large


def open_training(config: ConfigDict) -> AnnotatedSource:
    """Open the images that `config.data` names, without those that cannot train, and print their summary.

    Raises:
        UserError: if there are none.
    """
    data = config.data
    source = open_annotated(data.source, split=data.split, data_dir=data.data_dir, max_pixels=data.max_pixels)
    source = source.for_training()
    say(source.summary)
    return source


def open_validation(config: ConfigDict, training: AnnotatedSource | None, key: str) -> AnnotatedSource | None:
    """Open the images that `config.validation` names, and print their summary; None if none are named.

    Args:
        config: of the run.
        training: images whose classes must be the same; None: any.
        key: the key or flag that names the source, for error messages.

    Raises:
        UserError: if there are none, or their classes differ.
    """
    named, data = config.validation, config.data
    if named.source is None:
        return None
    source = open_annotated(
        named.source, split=named.split, key="validation", data_dir=data.data_dir, max_pixels=data.max_pixels
    )
    say(source.summary)
    if training is not None:
        require(
            source.classes == training.classes,
            f"{key}: its categories are {', '.join(source.classes)}, those of data.source "
            f"{', '.join(training.classes)}; use annotations with the same categories in both",
        )
    return source


def canvases(config: ConfigDict) -> tuple[Size, ...]:
    """Return the landscape canvases of training, heights and widths in pixels.

    Raises:
        UserError: if they do not fit together.
    """
    heights, widths = config.data.canvas_heights, config.data.canvas_widths
    require(
        len(heights) == len(widths),
        f"data.canvas_widths has {len(widths)} number(s), data.canvas_heights {len(heights)}; write one per canvas",
    )
    sizes = tuple(zip(heights, widths, strict=True))
    require(
        tuple(config.image_size) == sizes[-1],
        f"image_size is {tuple(config.image_size)}, but the last canvas {sizes[-1]}; make them equal",
    )
    channels = config.model.channels
    require(channels == 3, f"model.channels is {channels}, but detectors see images of 3 channels; set it to 3")
    for height, width in sizes:
        require(
            height <= width and height % STRIDES[-1] == width % STRIDES[-1] == 0,
            f"data.canvas_heights, data.canvas_widths: {height} x {width} is no canvas; write multiples of "
            f"{STRIDES[-1]}, with a height up to the width, because portrait images take it transposed",
        )
    require(
        list(heights) == sorted(set(heights)) and list(widths) == sorted(widths),
        f"data.canvas_heights, data.canvas_widths: {tuple(heights)} and {tuple(widths)} must ascend, as each canvas "
        "takes the short edges above the one before",
    )
    return sizes


def check_ranges(config: ConfigDict) -> None:
    """Check the ranges of sizes against the canvases; a UserError names those that are wrong."""
    short_edge, jitter, largest = tuple(config.data.short_edge), config.augment.jitter, canvases(config)[-1][0]
    require(
        len(short_edge) == 2 and short_edge[0] <= short_edge[1] <= largest,
        f"data.short_edge: {short_edge} is no range up to {largest}, the largest canvas height; write (min, max)",
    )
    require(
        jitter is None or (len(jitter) == 2 and jitter[0] <= jitter[1]),
        f"augment.jitter: {jitter} is no range; write (min, max), such as (0.1, 2.0), or None",
    )


def check_semantic(config: ConfigDict, source: AnnotatedSource) -> None:
    """Check the semantic map of the first image; a UserError names a wrong folder, or too few classes."""
    folder, classes = config.data.semantic, config.model.semantic_classes
    name = semantic_name(source, 0)
    try:
        labels = read_semantic(folder, name)
    except OSError as error:
        raise UserError(
            f"data.semantic: {printable(name)} in {printable(folder)} cannot be read ({first_line(error)}); name a "
            "folder with a PNG for each image"
        ) from None
    height, width = source.sizes[0].tolist()
    require(
        labels.shape == (height, width) and labels.dtype == np.uint8,
        f"data.semantic: {printable(name)} in {printable(folder)} is {list(labels.shape)}, {labels.dtype}, not "
        f"{[height, width]}, uint8; write one 8-bit class per pixel of the image",
    )
    highest = int(labels[labels != IGNORED].max(initial=0))
    require(
        highest < classes,
        f"model.semantic_classes is {classes}, but {printable(name)} in {printable(folder)} has class {highest}; write "
        f"--config.model.semantic_classes={highest + 1} or more",
    )


def shapes(sizes: tuple[Size, ...], orientations: Sequence[bool]) -> tuple[Size, ...]:
    """Return the shapes of canvases without duplicates, the largest first; an orientation is True for portrait."""
    return tuple(dict.fromkeys(oriented(size, portrait) for size in sizes[::-1] for portrait in orientations))


def training_arrays(config: ConfigDict, size: Size) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of a training sample's arrays in a canvas; see `LoadInstances`."""
    arrays = blank_arrays(size, semantic=bool(config.model.semantic_classes))
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


class Group(NamedTuple):
    """Images of one orientation, which share a canvas in evaluation; see also `Groups`, of training."""

    canvas: Size
    source: AnnotatedSource


def groups(config: ConfigDict, source: AnnotatedSource) -> Iterator[Group]:
    """Yield the images of each orientation with their canvas for evaluation; a square canvas takes all."""
    size = tuple(config.image_size)
    if size[0] == size[1]:
        yield Group(size, source)
        return
    for portrait in (False, True):
        chosen = np.flatnonzero(source.portrait == portrait)
        if len(chosen):
            yield Group(oriented(size, portrait), source.select(chosen))


def scaled_canvases(config: ConfigDict, canvas: Size) -> list[tuple[Size, int]]:
    """Return canvas and short edge of each size in which images are seen: the given one, and `validation.scales`."""
    short_edge = config.validation.short_edge
    sizes = [(canvas, short_edge)]
    for scale in config.validation.scales:
        height, width = (math.ceil(side * scale / short_edge / STRIDES[-1]) * STRIDES[-1] for side in canvas)
        sizes.append(((height, width), scale))
    return sizes


def eval_loader(config: ConfigDict, group: Group, mesh: Mesh, batch_size: int, named: set[str]) -> EvalLoader:
    """Load every image of a group once, in all sizes; see `LoadForDetection`, `LoadViews` and `EvalLoader`."""
    loaders = (
        LoadForDetection(group.source, canvas, short_edge, max(canvas))
        for canvas, short_edge in scaled_canvases(config, group.canvas)
    )
    return EvalLoader(
        len(group.source),
        LoadViews(tuple(loaders)),
        batch_size=batch_size,
        sharding=batch_sharding(mesh),
        named=named,
        readers=readers(config, tree_bytes(eval_arrays(config, group.canvas))),
    )


def eval_arrays(config: ConfigDict, canvas: Size) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of the arrays of one image that `eval_loader` loads."""
    arrays: dict[str, jax.ShapeDtypeStruct] = {}
    for number, (size, _) in enumerate(scaled_canvases(config, canvas)):
        image, image_size = view_names(number)
        arrays[image] = jax.ShapeDtypeStruct((*size, config.model.channels), jnp.uint8)
        arrays[image_size] = jax.ShapeDtypeStruct((2,), jnp.int32)
    return arrays | {
        "original_size": jax.ShapeDtypeStruct((2,), jnp.int32),
        "record": jax.ShapeDtypeStruct((), jnp.int32),
    }


def abstract_eval_batch(config: ConfigDict, canvas: Size, mesh: Mesh, batch_size: int) -> Batch:
    """Return shape, dtype and sharding of the arrays of a batch of `eval_loader`."""
    arrays = eval_arrays(config, canvas) | {"valid": jax.ShapeDtypeStruct((), jnp.bool_)}
    return abstract_batch(arrays, batch_size, batch_sharding(mesh))


def eval_batch_size(mesh: Mesh, largest: int) -> int:
    """Return the largest batch of evaluation up to a size, of at most MAX_BATCH images per device."""
    return max(1, min(MAX_BATCH, math.floor(largest / mesh.size))) * mesh.size
