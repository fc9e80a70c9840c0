"""COCO's metrics for boxes and masks, results in COCO's format, and masks in image size (DET 1.11, 6). No JAX.

The metrics are those of faster-coco-eval, whose numbers equal pycocotools'.
"""

import importlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from umae_jax.data.coco_json import usable_polygons
from umae_jax.data.instances import Polygons, Region, encode, parse_counts, rasterize
from umae_jax.errors import UserError
from umae_jax.files import AnyPath, write_atomic

KINDS = {"bbox": "box", "segm": "mask"}
# COCO's twelve numbers, in their order.
METRICS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
NO_OBJECTS = -1.0  # value of a metric without objects

Detection = dict[str, Any]  # image_id, category_id, bbox (x, y, width, height), score; segmentation, if it has a mask


def evaluate(
    ground_truth: dict[str, Any],
    detections: Sequence[Detection],
    kinds: Sequence[str] = ("bbox", "segm"),
    image_ids: Collection[int] | None = None,
) -> dict[str, float]:
    """Return COCO's twelve numbers per kind, and the AP of each category.

    Names are `box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, ..., `box_ar100`, ..., and `box_ap/NAME` for a category;
    likewise `mask_ap`. A number is -1 if no object of its size or category exists. Detections of images and
    categories that are not in the ground truth do not count.

    Args:
        ground_truth: COCO's images, annotations and categories; not changed. A missing `iscrowd` is 0 and a missing
            `area` that of the mask or box. Of objects without masks, "segm" sees none.
        detections: see `Detection`.
        kinds: "bbox", "segm" or both.
        image_ids: of the images to evaluate; None for all.
    """
    metrics: dict[str, float] = {}
    for kind in kinds:
        truth = _clean(ground_truth, kind, image_ids)
        images = {image["id"]: image for image in truth["images"]}
        categories = {category["id"]: category["name"] for category in truth["categories"]}
        found = [
            detection
            for detection in detections
            if detection["image_id"] in images and detection["category_id"] in categories
        ]
        stats, per_class = _run(truth, found, kind)
        prefix = KINDS[kind]
        metrics |= {f"{prefix}_{name}": value for name, value in zip(METRICS, stats, strict=True)}
        metrics |= {f"{prefix}_ap/{categories[number]}": value for number, value in per_class.items()}
    return metrics


def _clean(ground_truth: dict[str, Any], kind: str, image_ids: Collection[int] | None) -> dict[str, Any]:
    """Return the ground truth of some images, completed, as new objects."""
    wanted = None if image_ids is None else set(image_ids)
    images = [
        {"id": image["id"], "height": int(image["height"]), "width": int(image["width"])}
        for image in ground_truth["images"]
        if wanted is None or image["id"] in wanted
    ]
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    categories = {category["id"] for category in ground_truth["categories"]}
    annotations: list[dict[str, Any]] = []
    for entry in ground_truth["annotations"]:
        if entry["image_id"] not in sizes or entry["category_id"] not in categories:
            continue
        if not all(map(math.isfinite, entry["bbox"])):
            continue
        segmentation = entry.get("segmentation")
        if segmentation and not isinstance(segmentation, dict):
            segmentation = [part.astype(float).tolist() for part in usable_polygons(segmentation)]
        if kind == "segm" and not segmentation:
            continue
        chosen = {name: entry[name] for name in ("image_id", "category_id", "bbox")}
        chosen["id"] = len(annotations) + 1  # unique, and not 0, which means no match
        chosen["iscrowd"] = int(bool(entry.get("iscrowd")))
        size = sizes[entry["image_id"]]
        chosen["area"] = entry["area"] if "area" in entry else _area(entry["bbox"], segmentation, *size)
        if kind == "segm":
            chosen["segmentation"] = segmentation
        annotations.append(chosen)
    return {"info": {}, "images": images, "annotations": annotations, "categories": ground_truth["categories"]}


def _area(bbox: Sequence[float], segmentation: Any, height: int, width: int) -> float:  # noqa: ANN401 - any of COCO's
    """Return the area of a mask, or of the box of an object without one."""
    if not segmentation:
        return bbox[2] * bbox[3]
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return float(sum((parse_counts(counts.encode()) if isinstance(counts, str) else counts)[1::2]))
    parts = tuple(np.array(part, np.float32) for part in segmentation)
    return float(rasterize(Polygons(parts), height, width).pixels.sum())


def _run(truth: dict[str, Any], found: list[Detection], kind: str) -> tuple[list[float], dict[int, float]]:
    """Run faster-coco-eval: the twelve numbers, and the AP by category id."""
    try:
        library = importlib.import_module("faster_coco_eval")
    except ImportError:
        raise UserError(
            'the metrics of COCO need faster-coco-eval; install it with pip install "umae_jax[detect]"'
        ) from None
    truth_index = library.COCO()
    truth_index.dataset = truth
    truth_index.createIndex()
    results = truth_index.loadRes([dict(entry) for entry in found])  # it adds entries
    evaluation = library.COCOeval_faster(truth_index, results, kind, print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # [IoU, recall, category], all sizes, 100
    per_class = {}
    for index, number in enumerate(evaluation.params.catIds):
        values = precision[:, :, index]
        per_class[int(number)] = float(values[values > -1].mean()) if (values > -1).any() else NO_OBJECTS
    return [float(value) for value in evaluation.stats[: len(METRICS)]], per_class


def paste(probabilities: np.ndarray, box: np.ndarray, height: int, width: int) -> Region:
    """Return the pixels of a predicted mask with probability >= 0.5 in an image (DET 1.11 step 7).

    The time depends on the size of the box, not on the image's.

    Args:
        probabilities: over the box, float32 [m, m]; bilinear in between, with zeros around.
        box: x1 y1 x2 y2 in pixels of the image.
        height, width: of the image.
    """
    size = probabilities.shape[0]
    x1, y1, x2, y2 = np.asarray(box, np.float64).tolist()
    # Only pixels whose centre lies in the box reach 0.5.
    left, top = max(0, math.ceil(x1 - 0.5)), max(0, math.ceil(y1 - 0.5))
    right, bottom = min(width, math.floor(x2 - 0.5) + 1), min(height, math.floor(y2 - 0.5) + 1)
    if right <= left or bottom <= top or x2 <= x1 or y2 <= y1:
        return Region(np.zeros((0, 0), np.uint8), 0, 0)

    # Interpolate along one axis after the other. A product of matrices would start the threads of BLAS for every mask,
    # which takes ten times as long where other threads run.
    values = np.pad(np.asarray(probabilities, np.float32), 1)
    for first, last, lower, upper in ((top, bottom, y1, y2), (left, right, x1, x2)):
        positions = (np.arange(first, last) + 0.5 - lower) / (upper - lower) * size + 0.5  # of the padded mask
        below = np.minimum(positions.astype(np.int64), size)
        share = (positions - below).astype(np.float32)
        rise = np.diff(values, axis=0)[below]
        rise *= share[:, None]
        rise += values[below]
        values = np.ascontiguousarray(rise.T)
    return Region((values >= 0.5).astype(np.uint8), left, top)


def to_detections(
    image_id: int,
    size: tuple[int, int],
    boxes: np.ndarray,
    scores: np.ndarray,
    category_ids: np.ndarray,
    masks: np.ndarray | None = None,
) -> list[Detection]:
    """Return the detections of an image in COCO's format.

    Args:
        image_id: of the annotations.
        size: height and width of the image file.
        boxes: x1 y1 x2 y2 in its pixels, float32 [N, 4].
        scores: float32 [N].
        category_ids: of the annotations, int [N].
        masks: probabilities over the boxes, float32 [N, m, m]; None for detections without masks.
    """
    detections: list[Detection] = []
    for index, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, np.float64).tolist()):
        detection = {
            "image_id": int(image_id),
            "category_id": int(category_ids[index]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(scores[index]),
        }
        if masks is not None:
            detection["segmentation"] = encode(paste(masks[index], boxes[index], *size), *size)
        detections.append(detection)
    return detections


def write_results(path: AnyPath, detections: Iterable[Detection]) -> None:
    """Write detections as COCO's servers and tools read them, a JSON list; errors as for `write_atomic`."""
    write_atomic(path, json.dumps([*detections]).encode())
