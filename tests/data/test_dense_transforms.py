import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tests import annotated_images
from tests.annotated_images import COLORS, coco
from umae_jax.data.annotations import open_annotated
from umae_jax.data.copy_paste import blend
from umae_jax.data.decode import resize
from umae_jax.data.dense_transforms import IGNORED, MAX_BOXES, LoadForDetection, LoadInstances
from umae_jax.data.placement import choose_canvas
from umae_jax.data.transforms import READ_TRIES, sample_rng
from umae_jax.errors import UserError

CANVASES = ((96, 160), (160, 208))
OPTIONS = {"seed": 0, "batch_size": 2, "canvases": CANVASES, "short_edge": (60, 150), "long_edge": 208}


@pytest.fixture
def source(tmp_path):
    return open_annotated(annotated_images.write(tmp_path, coco()))


def check_objects(arrays, pasted=False):
    """Check that the colours under each mask are one object's, and that all its pixels lie under it."""
    height, width = arrays["image_size"]
    image = arrays["image"].astype(int)
    assert not image[height:].any()
    assert not image[:, width:].any()
    valid = arrays["box_valid"]
    count = int(valid.sum())
    assert not valid[count:].any()
    assert not arrays["boxes"][count:].any()
    assert not arrays["masks"][count:].any()
    for box, crop in zip(arrays["boxes"][:count], arrays["masks"][:count], strict=True):
        assert (box[:2] >= 0).all()
        assert box[2] <= width
        assert box[3] <= height
        x1, y1, x2, y2 = box.round().astype(int)
        if min(x2 - x1, y2 - y1) < 6:
            continue
        mask = resize(crop[..., None], (0, 0, 112, 112), (y2 - y1, x2 - x1), "bilinear")[..., 0]
        inside = image[y1:y2, x1:x2][mask > 250]
        if not len(inside):
            continue
        color = np.array(COLORS)[np.abs(np.array(COLORS)[:, None] - np.median(inside, 0)).sum(-1).argmin()]
        assert (np.abs(inside - color).max(-1) < 100).mean() > 0.8
        outside = image[y1:y2, x1:x2][mask < 5]
        if len(outside) and not pasted:  # an object of another image may have the same colour
            assert (np.abs(outside - color).max(-1) < 60).mean() < 0.05
    return count


def test_arrays_have_fixed_shapes(source):
    load = LoadInstances(source, **OPTIONS)
    arrays, unreadable = load(0, 0)
    canvas = choose_canvas(0, 0, CANVASES, (60, 150)).size
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "image": ((*canvas, 3), "uint8"),
        "image_size": ((2,), "int32"),
        "boxes": ((MAX_BOXES, 4), "float32"),
        "labels": ((MAX_BOXES,), "int32"),
        "box_valid": ((MAX_BOXES,), "bool"),
        "masks": ((MAX_BOXES, 112, 112), "uint8"),
        "mask_valid": ((MAX_BOXES,), "bool"),
    }
    assert not unreadable
    assert arrays["labels"][:3].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(arrays["mask_valid"], arrays["box_valid"])


@pytest.mark.parametrize("jitter", [None, (0.3, 2.0)])
@pytest.mark.parametrize("copy_paste", [0.0, 1.0])
def test_boxes_and_masks_follow_the_pixels(source, jitter, copy_paste):
    load = LoadInstances(source, **OPTIONS, jitter=jitter, copy_paste=copy_paste)
    counts = [check_objects(load(sample, sample % 4).arrays, bool(copy_paste)) for sample in range(40)]
    if jitter is None and not copy_paste:
        assert counts == [3] * 40
    else:
        assert len(set(counts)) > 1


def test_a_worker_process_loads_the_same(source):
    load = LoadInstances(source, **OPTIONS, jitter=(0.3, 2.0), copy_paste=0.5)
    expected = load(7, 0).arrays
    found = pickle.loads(pickle.dumps(load))(7, 0).arrays
    assert all((found[name] == expected[name]).all() for name in expected)


def test_samples_of_a_batch_share_a_canvas_and_differ_otherwise(source):
    load = LoadInstances(source, **OPTIONS)
    shapes = []
    for batch in range(12):
        first, second = load(2 * batch, 0).arrays, load(2 * batch + 1, 2).arrays
        assert first["image"].shape == second["image"].shape
        shapes.append(first["image"].shape[:2])
        again = load(2 * batch, 0).arrays
        assert all((again[name] == first[name]).all() for name in first)
        assert load(2 * batch, 1).arrays["image"].shape[:2] == shapes[-1][::-1]  # portrait
    assert set(shapes) == set(CANVASES)
    sizes = {tuple(load(sample, 0).arrays["image_size"].tolist()) for sample in range(24)}
    assert len(sizes) > 12


def test_half_of_the_images_are_flipped(source):
    load = LoadInstances(source, **OPTIONS)
    flipped = 0
    for sample in range(200):
        arrays = load(sample, 0).arrays
        flipped += bool(arrays["boxes"][0, 0] > arrays["image_size"][1] / 2)  # the first object is the leftmost
    assert 70 < flipped < 130


def test_short_edges_are_uniform_over_the_range(source):
    load = LoadInstances(source, **OPTIONS)
    edges = [int(load(2 * batch, 0).arrays["image_size"].min()) for batch in range(300)]
    assert min(edges) < 66
    assert max(edges) > 144
    assert np.mean(edges) == pytest.approx(105, abs=6)


def test_another_record_of_the_orientation_replaces_an_unreadable_one(source, tmp_path):
    (tmp_path / "images" / "0.png").write_bytes(b"not an image")
    load = LoadInstances(source, **OPTIONS)
    for sample in range(10):
        arrays, unreadable = load(sample, 0)
        assert {record.name for record in unreadable} == {str(tmp_path / "images" / "0.png")}
        height, width = arrays["image"].shape[:2]
        assert height < width
        check_objects(arrays)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    arrays, unreadable = load(0, 1)
    assert len(unreadable) == READ_TRIES
    assert {record.name[-5:] for record in unreadable} == {"1.png"}  # the only portrait image
    assert not arrays["image"].any()
    assert not arrays["box_valid"].any()


@pytest.mark.parametrize("load", ["training", "evaluation"])
def test_an_image_of_another_size_than_its_annotations_say_is_unreadable(tmp_path, load):
    name = annotated_images.write(tmp_path, coco())
    Image.new("RGB", (60, 45)).save(tmp_path / "images" / "0.png")
    source = open_annotated(name)
    if load == "training":
        _, unreadable = LoadInstances(source, **OPTIONS)(0, 0)
    else:
        _, unreadable = LoadForDetection(source, (64, 96), 64, 96)(0)
    assert unreadable[0].reason == "it has 60 x 45 pixels, but its annotations say 120 x 90"


def test_of_many_objects_a_random_choice_remains(tmp_path):
    content = coco(((90, 120),), objects=1)
    name = annotated_images.write(tmp_path, content)
    content["annotations"] = [
        {"id": n, "image_id": 10, "category_id": 3, "bbox": [n % 100, 5, 10, 10 + n / 10]} for n in range(250)
    ]
    (tmp_path / "annotations_train.json").write_text(json.dumps(content))
    load = LoadInstances(open_annotated(name), **OPTIONS)
    first, second = load(0, 0).arrays, load(1, 0).arrays
    assert first["box_valid"].all()
    assert not first["mask_valid"].any()
    assert not first["masks"].any()
    heights = [
        sorted(np.round((a["boxes"][:, 3] - a["boxes"][:, 1]) * 90 / a["image_size"][0], 1)) for a in (first, second)
    ]
    assert len(set(heights[0])) > 95
    assert heights[0] != heights[1]


def test_pasted_objects_occlude_and_occluded_ones_shrink(source):
    load = LoadInstances(source, **OPTIONS)
    canvas = choose_canvas(0, 0, CANVASES, (60, 150))
    layers = [load._decode(sample_rng(0, sample), 0, canvas, source[0].data) for sample in (0, 1)]
    base = layers[0]
    same = blend(base, base, sample_rng(0, 1), IGNORED, 8)  # what is pasted hides its original wholly
    assert len(same.boxes) == 3
    np.testing.assert_allclose(same.boxes[np.lexsort(same.boxes.T)], base.boxes[np.lexsort(base.boxes.T)], atol=1)
    np.testing.assert_array_equal(same.pixels, base.pixels)
    for seed in range(10):
        result = blend(*layers, sample_rng(seed, 0), IGNORED, 8)
        if result is base:
            continue  # nothing was pasted
        covered = np.zeros(result.placement.content, int)
        for mask, box in zip(result.masks, result.boxes, strict=True):
            np.testing.assert_allclose(mask.box, box, atol=1)
            rows, columns = mask.pixels.shape
            covered[mask.top : mask.top + rows, mask.left : mask.left + columns] += mask.pixels
        assert covered.max() <= 1


def test_copy_paste_needs_masks(tmp_path):
    content = coco()
    name = annotated_images.write(tmp_path, content)
    for entry in content["annotations"]:
        del entry["segmentation"]
    (tmp_path / "annotations_train.json").write_text(json.dumps(content))
    source = open_annotated(name)
    assert not LoadInstances(source, **OPTIONS)(0, 0).arrays["mask_valid"].any()
    with pytest.raises(UserError, match="copy_paste"):
        LoadInstances(source, **OPTIONS, copy_paste=0.5)


@pytest.mark.parametrize("jitter", [None, (0.5, 2.0)])
def test_semantic_maps_follow_the_image(source, tmp_path, jitter):
    folder = tmp_path / "semantic"
    folder.mkdir()
    for index in range(4):
        pixels = np.asarray(Image.open(tmp_path / "images" / f"{index}.png")).astype(int)
        codes = (pixels > 127) @ [1, 2, 4]
        Image.fromarray(codes.astype(np.uint8)).save(folder / f"{index}.png")
    load = LoadInstances(source, **OPTIONS, jitter=jitter, semantic_folder=str(folder))
    agree = []
    for sample in range(20):
        arrays = load(sample, sample % 4).arrays
        semantic, (height, width) = arrays["semantic"], arrays["image_size"]
        assert semantic.shape == tuple(side // 8 for side in arrays["image"].shape[:2])
        rows, columns = -(-height // 8), -(-width // 8)
        assert (semantic[rows:] == IGNORED).all()
        assert (semantic[:, columns:] == IGNORED).all()
        shown = (arrays["image"][::8, ::8] > 127) @ [1, 2, 4]
        agree.append((semantic[:rows, :columns] == shown[:rows, :columns]).mean())
    assert np.mean(agree) > 0.99
    pasted = LoadInstances(source, **OPTIONS, semantic_folder=str(folder), copy_paste=1.0)
    assert any((pasted(s, 0).arrays["semantic"][:5, :5] == IGNORED).any() for s in range(30))
    (folder / "0.png").unlink()
    assert load(0, 0).unreadable[0].name == str(folder / "0.png")
    Image.new("L", (5, 5)).save(folder / "0.png")
    assert load(0, 0).unreadable[0].reason == "its semantic map is [5, 5], uint8, not [90, 120], uint8"


def test_evaluation_resizes_once(source, tmp_path):
    load = LoadForDetection(source, (96, 160), 80, 110)
    arrays, unreadable = load(0)
    assert arrays["image"].shape == (96, 160, 3)
    assert arrays["image_size"].tolist() == [80, 107]
    assert arrays["original_size"].tolist() == [90, 120]
    assert arrays["record"] == 0
    assert {name: arrays[name].dtype.name for name in arrays} == {
        "image": "uint8",
        "image_size": "int32",
        "original_size": "int32",
        "record": "int32",
    }
    pixels = np.asarray(Image.open(tmp_path / "images" / "0.png"))
    expected = resize(pixels, (0, 0, 120, 90), (80, 107), "bilinear")
    np.testing.assert_array_equal(arrays["image"][:80, :107], expected)
    assert not arrays["image"][80:].any()
    portrait = load(1).arrays
    assert portrait["image_size"].tolist() == [96, 72]  # reduced further
    blank, unreadable = load(-1)
    assert not unreadable
    assert blank["record"] == -1
    assert not blank["image"].any()
    assert not blank["image_size"].any()
    (tmp_path / "images" / "3.png").write_bytes(b"nothing")
    broken, unreadable = load(3)
    assert len(unreadable) == 1
    assert broken["record"] == 3
    assert not broken["image_size"].any()
