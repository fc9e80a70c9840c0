"""Pictures of detections, in validations and for images without annotations."""

import itertools
import json
import operator
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from umae_jax.console import duration, say, warn
from umae_jax.data.annotations import AnnotatedSource, without_annotations
from umae_jax.data.sources import open_images
from umae_jax.detection.coco import paste
from umae_jax.drawing import draw_instances, draw_sheet, encode_png
from umae_jax.errors import UserError, printable, require
from umae_jax.files import AnyPath, write_atomic
from umae_jax.multihost import all_gather_json, is_primary
from umae_jax.tasks.annotated import eval_batch_size
from umae_jax.tasks.detecting import Finder, ImageDetections
from umae_jax.training.task import Prediction
from umae_jax.weights.stored_run import StoredRun

MIN_SCORE = 0.3  # of a detection that is drawn


def draw_found(source: AnnotatedSource, found: ImageDetections, classes: Sequence[str]) -> np.ndarray:
    """Draw the detections of an image whose score is at least MIN_SCORE: uint8 [H, W, 3]."""
    pixels = source.decode(source[found.record].data)
    shown = np.flatnonzero(found.scores.astype(np.float64).round(4) >= MIN_SCORE)  # as written to files
    boxes, scores, labels = (array[shown] for array in (found.boxes, found.scores, found.labels))
    masks = (
        [] if found.masks is None else [paste(found.masks[index], found.boxes[index], *found.size) for index in shown]
    )
    return draw_instances(pixels, boxes, labels, classes, scores=scores, masks=masks)


def draw_examples(examples: Sequence[tuple[AnnotatedSource, ImageDetections]], classes: Sequence[str]) -> bytes | None:
    """Draw the detections of some images on one sheet, PNG; None without images."""
    if not examples:
        return None
    pictures = [draw_found(source, found, classes) for source, found in examples]
    captions = [f"{source.file_name(found.record)}, scores from {MIN_SCORE}" for source, found in examples]
    return encode_png(draw_sheet(pictures, captions))


def predict_objects(run: StoredRun, path: Path, mesh: Mesh, batch_size: int, folder: AnyPath) -> Iterator[Prediction]:
    """Yield the detections of each image, and draw those of score MIN_SCORE and above.

    The pictures are FOLDER/NAME.png; FOLDER/detections.json holds all detections. Images that cannot be read are named
    on the terminal, and counted at the end. Several processes yield the detections of all of them at the end.

    Args:
        run: of a detector, its parameters replicated on the mesh.
        path: an image file, or a folder of them.
        mesh: the devices.
        batch_size: global.
        folder: to write to.

    Raises:
        UserError: if the folder is a file or, at the end, if no image can be read.
    """
    require(
        folder.suffix != ".csv" and not folder.is_file(),
        f"--output: a detector draws pictures, and {folder} is a file; write a folder",
    )
    images = open_images(path)
    folder.mkdir(parents=True, exist_ok=True)
    images.max_pixels = run.config.data.max_pixels
    source = without_annotations(images)
    classes = run.classes or tuple(f"class {number}" for number in range(run.config.model.classes))
    batch_size = eval_batch_size(mesh, min(batch_size, len(source)))
    find = Finder(run.config, run.graph, run.params, source, mesh, batch_size)
    pictures = picture_names([source.file_name(index) for index in range(len(source))])
    start = time.monotonic()
    rows: dict[int, dict[str, Any]] = {}
    hidden = not (is_primary() and sys.stderr.isatty())
    with tqdm(total=len(source), unit="image", dynamic_ncols=True, leave=False, disable=hidden) as bar:
        for view, found in find(run.params):
            name = view.file_name(found.record)
            index = int(view.image_ids[found.record])  # ids count the images
            picture = folder / pictures[index]
            write_atomic(picture, encode_png(draw_found(view, found, classes)))
            objects = _objects(found, classes)
            rows[index] = {"image": name, "picture": str(picture), "objects": objects}
            bar.update()
            if jax.process_count() == 1:
                yield _describe(rows[index]), rows[index]
    gathered = [row for part in all_gather_json(list(rows.items())) for row in part]
    ordered = [row for _, row in sorted(gathered, key=operator.itemgetter(0))]
    if jax.process_count() > 1:
        yield from ((_describe(row), row) for row in ordered)
    if not ordered:
        raise UserError("--images: none of the images can be read; repair them or name others")
    if is_primary():
        write_atomic(folder / "detections.json", json.dumps(ordered).encode())
    seconds = time.monotonic() - start
    say(f"{len(ordered):,} pictures in {folder}, in {duration(seconds)}; scores below {MIN_SCORE} are not drawn")
    if len(ordered) < len(source):
        warn(f"{len(source) - len(ordered):,} of {len(source):,} images cannot be read and are left out")


def picture_names(names: Sequence[str]) -> list[str]:
    """Return a file name for the picture of each image, without folders; no two are equal, also in capitals."""
    pictures: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem = name.replace("/", "_")
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        stem = next(one for one in itertools.chain([stem], numbered) if one.lower() not in taken)
        taken.add(stem.lower())
        pictures.append(f"{stem}.png")
    return pictures


def _describe(row: dict[str, Any]) -> str:
    """Return the drawn objects of an image in one line."""
    drawn = [one for one in row["objects"] if one["score"] >= MIN_SCORE]
    line = ", ".join(f"{printable(one['class'])} {one['score']:.1%}" for one in drawn) or "nothing"
    return f"{printable(row['image'])}: {line}"


def _objects(found: ImageDetections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the detections of an image: class, score, and box x1 y1 x2 y2 in pixels of the image file."""
    columns = (found.labels.tolist(), found.scores.tolist(), found.boxes.tolist())
    return [
        {"class": classes[label], "score": round(score, 4), "box": [round(side, 1) for side in box]}
        for label, score, box in zip(*columns, strict=True)
    ]
