"""Write small annotated data sets for tests: shapes in colours on black, so that pixels tell the objects."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))
CLASSES = {3: "disc", 7: "box"}


def disc(cx, cy, radius, points=64):
    """Return a polygon around a disc."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([cx + radius * np.cos(angles), cy + radius * np.sin(angles)], 1).ravel().tolist()


def annotation(number, image_id, category, polygon):
    """Return an annotation in COCO's format."""
    points = np.array(polygon).reshape(-1, 2)
    (x1, y1), (x2, y2) = points.min(0).tolist(), points.max(0).tolist()
    entry = {"id": number, "image_id": image_id, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    return entry | {"area": 0.7 * (x2 - x1) * (y2 - y1), "iscrowd": 0, "segmentation": [polygon]}


def coco(sizes=((90, 120), (120, 90), (90, 120), (100, 130)), objects=3):
    """Return annotations of images with three shapes, by their (height, width)."""
    images, annotations = [], []
    for index, (height, width) in enumerate(sizes):
        image_id = 10 + index
        images.append({"id": image_id, "file_name": f"{index}.png", "height": height, "width": width})
        for number in range(objects):
            rng = np.random.default_rng((index, number))
            side = (width - 8) / objects
            cx, cy = 4 + side * (number + 0.5), rng.uniform(24, max(25, height - 24))
            radius = min(side / 2 - 2, 18)
            x1, y1, x2, y2 = cx - radius, cy - radius / 2, cx + radius, cy + radius / 2
            triangle, rectangle = [x1, y1, x2, y2, x1, y2], [x1, y1, x2, y1, x2, y2, x1, y2]
            polygon = (disc(cx, cy, radius), rectangle, triangle)[number % 3]
            category = sorted(CLASSES)[number % 2]
            annotations.append(annotation(len(annotations) + 1, image_id, category, polygon))
    categories = [{"id": number, "name": name} for number, name in reversed(CLASSES.items())]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, content, split="train", images="images"):
    """Write annotations, and an image with its objects in colours for every entry; return `coco:FOLDER`."""
    from umae_jax.data.instances import Polygons, rasterize

    (folder / images).mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        pixels = np.zeros((entry["height"], entry["width"], 3), np.uint8)
        mine = [other for other in content["annotations"] if other["image_id"] == entry["id"]]
        for color, other in zip(COLORS, mine, strict=False):
            parts = tuple(np.array(part, np.float32) for part in other.get("segmentation", ()))
            if parts:
                region = rasterize(Polygons(parts), *pixels.shape[:2])
                rows, columns = region.pixels.shape
                pixels[region.top : region.top + rows, region.left : region.left + columns][region.pixels > 0] = color
        Image.fromarray(pixels).save(folder / images / entry["file_name"])
    (folder / f"annotations_{split}.json").write_text(json.dumps(content))
    return f"coco:{folder}"
