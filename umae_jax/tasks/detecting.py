"""Detections on annotated images, and COCO's metrics of them: every image counts once, on any number of processes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.annotations import AnnotatedSource
from umae_jax.data.dense_transforms import view_names
from umae_jax.detection.augmentation import View, detect_in_views
from umae_jax.detection.coco import Detection, evaluate, to_detections
from umae_jax.detection.detector import Detected
from umae_jax.errors import UserError, printable, require
from umae_jax.multihost import all_gather_json, broadcast_json, is_primary
from umae_jax.tasks import annotated
from umae_jax.training.sharding import batch_sharding, local_rows
from umae_jax.training.task import Batch, Params

MAX_ROWS = 20  # of the table of classes


class ImageDetections(NamedTuple):
    """The detections of one image, on the host, in pixels of the image file; `Detected` are those of a batch."""

    record: int
    size: tuple[int, int]  # height and width of the image file
    boxes: np.ndarray  # float32 [N, 4]
    scores: np.ndarray  # float32 [N]
    labels: np.ndarray  # int32 [N]
    masks: np.ndarray | None  # probabilities within the boxes, float32 [N, 28, 28]


class Results(NamedTuple):
    """The metrics of a data set, and the detections that they are computed from."""

    metrics: dict[str, float]  # "box_ap" and the like; "box_ap/CLASS" of each class
    images: int  # number of readable images
    unreadable: int
    detections: list[Detection]  # of all processes
    examples: list[tuple[AnnotatedSource, "ImageDetections"]]  # of this process, for pictures

    def table(self) -> str:
        """Return AP per class, the worst classes if there are many."""
        kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in self.metrics]
        names = [name.partition("/")[2] for name in self.metrics if name.startswith("box_ap/")]
        values = {name: [self.metrics[f"{kind}_ap/{name}"] for kind in kinds] for name in names}
        shown = (
            sorted(values, key=lambda name: (values[name][0] < 0, values[name][0]))[:MAX_ROWS]
            if len(names) > MAX_ROWS
            else names
        )
        width = max(map(len, (*shown, "class")))
        lines = [f"  {'class':{width}}" + "".join(f"{f'{kind} AP':>10}" for kind in kinds)]
        for name in shown:
            cells = (f"{value:.2%}" if value >= 0 else "no objects" for value in values[name])
            lines.append(f"  {printable(name):{width}}" + "".join(f"{cell:>10}" for cell in cells))
        if len(names) > len(shown):
            lines.append(f"  and {len(names) - len(shown):,} more classes, which are better")
        return "\n".join(lines)


class Finder:
    """Detects objects in all images of a source; compiled once per canvas.

    Args:
        config, graph: of the detector.
        params: its parameters, or their shapes with shardings.
        source: the images.
        mesh: the devices.
        batch_size: global.
        check: called before each batch; may raise to stop.
    """

    def __init__(
        self,
        config: ConfigDict,
        graph: nnx.GraphDef,
        params: Params,
        source: AnnotatedSource,
        mesh: Mesh,
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        def detect(params: Params, batch: Batch) -> tuple[Detected, dict[str, jax.Array]]:
            model = nnx.merge(graph, params)
            images = [
                View(batch[image], batch[image_size], flip)
                for image, image_size in map(view_names, range(1 + len(config.validation.scales)))
                for flip in ((False, True) if config.validation.flip else (False,))
            ]
            found = detect_in_views(model, images) if len(images) > 1 else model(*images[0][:2])
            return found, {key: batch[key] for key in ("image_size", "original_size", "record", "valid")}

        jitted = jax.jit(detect, out_shardings=batch_sharding(mesh))
        self._groups = []
        named: set[str] = set()
        for group in annotated.groups(config, source):
            shapes = annotated.abstract_eval_batch(config, group.canvas, mesh, batch_size)
            with jax.set_mesh(mesh):
                compiled = jitted.lower(params, shapes).compile()
            self._groups.append((annotated.eval_loader(config, group, mesh, batch_size, named), compiled, group.source))
        self._check = check

    def __call__(self, params: Params) -> Iterator[tuple[AnnotatedSource, ImageDetections]]:
        """Yield the detections of each readable image of this process, and the source of its record."""
        for loader, compiled, source in self._groups:
            pending = None
            for batch in loader:
                self._check()
                results = compiled(params, batch)
                if pending is not None:
                    yield from ((source, found) for found in _to_host(*pending))
                pending = results
            if pending is not None:
                yield from ((source, found) for found in _to_host(*pending))


def _to_host(found: Detected, batch: dict[str, jax.Array]) -> Iterator[ImageDetections]:
    """Yield the detections of the valid images of a batch that this process holds."""
    results, rows = jax.tree.map(local_rows, (found, batch))
    for row in np.flatnonzero(rows["valid"]):
        height, width = rows["original_size"][row].tolist()
        scale = np.array([height, width], np.float32) / rows["image_size"][row]
        kept = results.valid[row]
        boxes = results.boxes[row][kept] * np.tile(scale[::-1], 2).astype(np.float32)
        masks = None if results.masks is None else results.masks[row][kept]
        scores, labels = results.scores[row][kept], results.labels[row][kept]
        yield ImageDetections(int(rows["record"][row]), (height, width), boxes, scores, labels, masks)


def make_evaluator(
    config: ConfigDict,
    graph: nnx.GraphDef,
    params: Params,
    source: AnnotatedSource,
    mesh: Mesh,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
    key: str = "validation.source",
) -> Callable[[Params], Results]:
    """Compile the evaluation of a detector on every image of a source; all processes must call it.

    Args:
        config, graph, params, source, mesh, batch_size, check: see `Finder`.
        key: the configuration key or flag that names the source, for error messages.
    """
    find = Finder(config, graph, params, source, mesh, batch_size, check)
    kinds = ["bbox", *(["segm"] if config.model.masks and source.has_masks else [])]
    truth = source.ground_truth() if is_primary() else {}

    def measure(params: Params) -> Results:
        own: list[Detection] = []
        images: list[int] = []
        examples: list[tuple[AnnotatedSource, ImageDetections]] = []
        for part, found in find(params):
            if len(examples) < config.pictures:
                examples.append((part, found))
            image = int(part.image_ids[found.record])
            images.append(image)
            categories = part.category_ids[found.labels]
            own += to_detections(image, found.size, found.boxes, found.scores, categories, found.masks)
        gathered = all_gather_json([images, own])
        seen = [image for part, _ in gathered for image in part]
        detections = [detection for _, part in gathered for detection in part]
        require(bool(seen), f"{key}: none of its images can be read; repair them or name another source")
        metrics: Any = None
        if is_primary():
            try:
                metrics = evaluate(truth, detections, kinds, seen)
            except UserError as error:  # a missing package, which the others must hear of
                metrics = str(error)
        metrics = broadcast_json(metrics)
        require(not isinstance(metrics, str), metrics)
        return Results(metrics, len(seen), len(source) - len(seen), detections, examples)

    return measure
