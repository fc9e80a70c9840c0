"""Show what a detection data set holds: classes, boxes, sizes, what is left out, and a picture of a few images.

    python -m umae_jax.inspect_data --source coco:FOLDER [--split val] [--output FILE.png]

A source is coco:FOLDER, coco:ANNOTATIONS.json@IMAGES or tfds:NAME. The picture shows images spread over the data set.
"""

from collections.abc import Iterator

import numpy as np
from absl import flags

from umae_jax import cli, console
from umae_jax.annotated import draw_instances, draw_sheet, encode_png
from umae_jax.data.annotations import CROWD, AnnotatedSource, open_annotated
from umae_jax.data.decode import EncodedImage
from umae_jax.data.instances import rasterize
from umae_jax.data.transforms import Unreadable, try_load
from umae_jax.errors import require
from umae_jax.files import locate_local, write_atomic

PICTURES = 6
AREAS = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))  # COCO's, in pixels
MAX_CLASSES = 100  # listed

_SOURCE = flags.DEFINE_string("source", None, "Annotated images: coco:FOLDER, coco:JSON@IMAGES or tfds:NAME.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of a folder or data set: train or val.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of TFDS data sets.")
_OUTPUT = flags.DEFINE_string("output", None, "PNG file of annotated images to write.")


def describe(source: AnnotatedSource) -> Iterator[str]:
    """Yield lines about a source: classes, boxes, sizes, and what training leaves out."""
    boxes, labels = source.objects
    counts = np.bincount(labels, minlength=len(source.classes))
    images = np.zeros(len(source.classes), np.int64)
    for index in range(len(source)):
        images[np.unique(source.instances(index).labels)] += 1
    width = max(map(len, (*source.classes, "class")))
    yield f"{'class':<{width}} {'id':>6} {'objects':>10} {'images':>10}"
    order = np.argsort(-counts, kind="stable")
    for label in order[:MAX_CLASSES].tolist():
        name, category = source.classes[label], source.category_ids[label]
        yield f"{name:<{width}} {category:>6} {counts[label]:>10,} {images[label]:>10,}"
    if len(order) > MAX_CLASSES:
        yield f"and {len(order) - MAX_CLASSES:,} classes with fewer objects"
    per_image = source.object_counts
    yield f"boxes per image: min {per_image.min():,}, median {np.median(per_image):,.0f}, max {per_image.max():,}"
    if len(boxes):
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        shares = [(name, float(((areas >= low) & (areas < high)).mean())) for name, low, high in AREAS]
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        yield f"box areas (small below 32 x 32, large from 96 x 96 pixels): {listed}"
    heights, widths = source.sizes.T
    yield (
        f"image sizes: width {widths.min()} to {widths.max()}, height {heights.min()} to {heights.max()} pixels; "
        f"{int(source.portrait.sum()):,} portrait, {int((~source.portrait).sum()):,} landscape"
    )
    yield f"masks: {'yes' if source.has_masks else 'no, boxes only'}"
    yield f"crowd regions, which only evaluation uses: {source.left_out.get(CROWD, (0, ''))[0]:,}"
    training = source.for_training()
    yield f"images that can train: {len(training):,} of {len(source):,}"
    for reason, (count, first) in training.left_out.items():
        yield f"left out: {count:,} {reason} (first {first})"


def draw(source: AnnotatedSource, count: int = PICTURES) -> np.ndarray:
    """Draw images spread over a source with their objects, on one sheet: uint8 [H, W, 3].

    Raises:
        UserError: if none of them can be read.
    """
    pictures, captions = [], []
    for index in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist():
        boxes, labels, masks = source.instances(index)

        def decode(data: bytes) -> np.ndarray:
            image = EncodedImage(data, source.max_pixels, exif=False)
            return image.crop((0, 0, *image.size), image.size[::-1], 3, "bilinear")

        loaded = try_load(source, index, decode)
        if isinstance(loaded, Unreadable):
            console.warn(f"skipped an image that cannot be read: {loaded.name} ({loaded.reason})")
            continue
        pixels = loaded[1]
        regions = [None if mask is None else rasterize(mask, *pixels.shape[:2]) for mask in masks]
        pictures.append(draw_instances(pixels, boxes, labels, source.classes, masks=regions))
        captions.append(f"{loaded[0].name}: {len(boxes)} objects")
    require(bool(pictures), f"--source: none of {count} images can be read; repair them or choose another source")
    return draw_sheet(pictures, captions)


def main() -> None:
    """Print the description of the source that the flags name, and write the picture."""
    name = cli.required(_SOURCE, "coco:FOLDER, coco:ANNOTATIONS.json@IMAGES or tfds:NAME")
    output = locate_local(_OUTPUT.value, "--output") if _OUTPUT.value else None
    source = open_annotated(name, split=_SPLIT.value, key="--", data_dir=_DATA_DIR.value)
    console.result(source.summary)
    for line in describe(source):
        console.result(line)
    if output is not None:
        write_atomic(output, encode_png(draw(source)))
        console.result(f"wrote {output}")


if __name__ == "__main__":
    cli.run(main, compiles=False)
