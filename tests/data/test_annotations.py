import contextlib
import copy
import json
import math
import pickle

import numpy as np
import pytest

from tests import annotated_images
from tests.annotated_images import annotation, coco, disc
from tests.images import write_folder
from umae_jax.data.annotations import open_annotated
from umae_jax.data.instances import Polygons, RunLengths, encode, rasterize
from umae_jax.data.prepare import write_data_set
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError


def opened(tmp_path, content, **options):
    return open_annotated(annotated_images.write(tmp_path, content), **options)


def test_images_and_objects_are_read(tmp_path):
    content = coco()
    source = opened(tmp_path, content)
    assert source.classes == ("disc", "box")
    assert source.category_ids.tolist() == [3, 7]
    assert source.image_ids.tolist() == [10, 11, 12, 13]
    assert source.sizes.tolist() == [[90, 120], [120, 90], [90, 120], [100, 130]]
    assert source.portrait.tolist() == [False, True, False, False]
    assert source.object_counts.tolist() == [3, 3, 3, 3]
    assert source.has_masks
    for index in range(len(source)):
        boxes, labels, masks = source.instances(index)
        mine = [entry for entry in content["annotations"] if entry["image_id"] == source.image_ids[index]]
        x, y, width, height = np.array([entry["bbox"] for entry in mine]).T
        np.testing.assert_allclose(boxes, np.stack([x, y, x + width, y + height], 1), rtol=1e-6)
        assert (boxes.dtype, labels.dtype) == (np.float32, np.int32)
        assert labels.tolist() == [0, 1, 0]
        for mask, entry in zip(masks, mine, strict=True):
            np.testing.assert_allclose(mask.parts[0], entry["segmentation"][0], rtol=1e-6)
        record = source[index]
        assert record.name == str(tmp_path / "images" / f"{index}.png")
        assert record.data == (tmp_path / "images" / f"{index}.png").read_bytes()


def test_objects_in_any_order_come_to_their_images(tmp_path):
    content = coco()
    source = opened(tmp_path / "a", content)
    content["annotations"].sort(key=lambda entry: -entry["id"])
    other = opened(tmp_path / "b", content)
    for index in range(len(source)):
        expected, found = source.instances(index), other.instances(index)
        np.testing.assert_array_equal(found.boxes, expected.boxes[::-1])
        for mask, same in zip(found.masks, expected.masks[::-1], strict=True):
            np.testing.assert_array_equal(mask.parts[0], same.parts[0])


def test_the_layout_of_coco_is_found(tmp_path):
    content = coco()
    annotated_images.write(tmp_path, content, "val", "val2017")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations_val.json").rename(tmp_path / "annotations" / "instances_val2017.json")
    source = open_annotated(f"coco:{tmp_path}", split="val")
    assert len(source) == 4
    path = tmp_path / "annotations" / "instances_val2017.json"
    own = open_annotated(f"coco:{path}@{tmp_path / 'val2017'}")
    assert own.digest == source.digest
    with pytest.raises(UserError, match=r"data.source.*instances_train2017.json nor annotations_train.json"):
        open_annotated(f"coco:{tmp_path}")


def test_a_source_survives_pickling_and_selection(tmp_path):
    source = opened(tmp_path, coco())
    assert source.digest
    chosen = pickle.loads(pickle.dumps(source.select(np.array([3, 1]))))
    assert len(chosen) == 2
    assert chosen.image_ids.tolist() == [13, 11]
    assert chosen.portrait.tolist() == [False, True]
    assert chosen.digest != source.digest
    assert chosen[0] == source[3]
    np.testing.assert_array_equal(chosen.instances(1).boxes, source.instances(1).boxes)
    assert "2 images with 6 objects" in chosen.summary
    np.testing.assert_array_equal(chosen.objects[0], np.concatenate([source.instances(i).boxes for i in (1, 3)]))


def test_run_lengths_and_boxes_alone_are_masks_or_none(tmp_path):
    content = coco(objects=4)
    polygon = Polygons((np.array(content["annotations"][0]["segmentation"][0], np.float32),))
    region = rasterize(polygon, 90, 120)
    rle = encode(region, 90, 120)
    flat = np.zeros((90, 120), np.uint8)
    flat[region.top : region.top + region.pixels.shape[0], region.left : region.left + region.pixels.shape[1]] = (
        region.pixels
    )
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.T.ravel(), [0]])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    name = annotated_images.write(tmp_path, content)
    first, second, third = content["annotations"][:3]
    first["segmentation"] = rle
    second["segmentation"] = {"size": [90, 120], "counts": counts}
    del third["segmentation"]
    (tmp_path / "annotations_train.json").write_text(json.dumps(content))
    masks = open_annotated(name).instances(0).masks
    assert masks[:3] == (RunLengths(rle["counts"].encode()), RunLengths(rle["counts"].encode()), None)
    assert isinstance(masks[3], Polygons)


DROPPED = {
    "crowd regions": {"iscrowd": 1},
    "objects marked as ignored": {"ignore": 1},
    "objects of unknown categories": {"category_id": 1},
    "objects of unknown images": {"image_id": 99},
    "boxes without area or with sides below 1 pixel": {"bbox": [5, 5, 20, 0.9]},
    "boxes outside of their image": {"bbox": [120, 5, 20, 20]},
    "boxes that are not finite": {"bbox": [5, float("nan"), 20, 20]},
    "polygons with too few, odd or impossible numbers": {"segmentation": [[1, 2, 3, 4]]},
}


@pytest.mark.parametrize("reason", DROPPED)
def test_objects_that_do_not_count_are_counted(tmp_path, reason):
    content = coco()
    name = annotated_images.write(tmp_path, content)
    extra = [annotation(70 + index, 10, 3, disc(50, 50, 10)) | DROPPED[reason] for index in range(2)]
    content["annotations"] = [*extra, *content["annotations"]]
    (tmp_path / "annotations_train.json").write_text(json.dumps(content))
    source = open_annotated(name)
    assert source.object_counts.tolist() == [3, 3, 3, 3]
    assert source.left_out == {reason: (2, "annotation 70")}
    assert f"left out: 2 {reason} (first annotation 70)" in source.summary


@pytest.mark.parametrize("area", [0, -1])
def test_an_object_without_area_does_not_count(tmp_path, area):
    content = coco()
    content["annotations"][0]["area"] = area
    assert opened(tmp_path, content).object_counts.tolist() == [2, 3, 3, 3]


def test_bad_polygons_of_an_object_with_good_ones_are_left_out(tmp_path):
    content = coco()
    name = annotated_images.write(tmp_path, content)
    content["annotations"][0]["segmentation"] += [[1, 2, 3, 4, 5, 6, 7], [1, 2], [1, 2, 3, 4, 5, float("nan")]]
    (tmp_path / "annotations_train.json").write_text(json.dumps(content))
    source = open_annotated(name)
    assert len(source.instances(0).masks[0].parts) == 1
    assert source.left_out == {"polygons with too few, odd or impossible numbers": (3, "annotation 1")}


def test_images_that_cannot_train_are_left_out_for_training_only(tmp_path):
    content = coco(((90, 120), (120, 90), (31, 120), (100, 130)))
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 11]
    for entry in content["annotations"]:
        if entry["image_id"] == 12:
            entry["bbox"] = [1, 1, 20, 20]
    source = opened(tmp_path, content)
    assert len(source) == 4
    training = source.for_training()
    assert training.image_ids.tolist() == [10, 13]
    assert training.left_out == {"images without objects": (1, "1.png"), "images below 32 pixels": (1, "2.png")}
    content["annotations"] = []
    with pytest.raises(UserError, match="none of its 4 images can train"):
        opened(tmp_path, content).for_training()


def test_missing_images_are_left_out_unless_all_are(tmp_path):
    name = annotated_images.write(tmp_path, coco())
    (tmp_path / "images" / "1.png").unlink()
    source = open_annotated(name)
    assert source.image_ids.tolist() == [10, 12, 13]
    assert source.left_out == {"images that do not exist": (1, "1.png")}
    assert {image["id"] for image in source.ground_truth()["images"]} == {10, 12, 13}
    assert {entry["image_id"] for entry in source.ground_truth()["annotations"]} == {10, 12, 13}
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"none of the 4 images of .*annotations_train.json exists.*0.png"):
        open_annotated(name)


def test_gaps_between_categories_and_subfolders_are_fine(tmp_path):
    content = coco()
    (tmp_path / "images" / "deep").mkdir(parents=True)
    content["images"][0]["file_name"] = "deep/0.png"
    content["categories"].append({"id": 90, "name": "unused\n"})
    source = opened(tmp_path, content)
    assert source.classes == ("disc", "box", "unused\\n")
    assert source[0].data == (tmp_path / "images" / "deep" / "0.png").read_bytes()


def broken(change):
    content = coco()
    change(content)
    return content


RLE = {"size": [5, 6], "counts": "0"}
WRONG = {
    "no list 'images'": lambda content: content.pop("images"),
    "no list 'annotations'": lambda content: content.update(annotations=3),
    "no list 'categories'": lambda content: content.update(categories=[1]),
    "no images": lambda content: content["images"].clear(),
    "no categories": lambda content: content["categories"].clear(),
    "two images have the id 10": lambda content: content["images"][1].update(id=10),
    "image 11 has no file_name": lambda content: content["images"][1].pop("file_name"),
    "image 11 needs height and width": lambda content: content["images"][1].update(width=None),
    "needs an id": lambda content: content["images"][1].pop("id"),
    "two categories have the id 7": lambda content: content["categories"][1].update(id=7),
    "needs a name": lambda content: content["categories"][1].pop("name"),
    "annotation 2 has no 'bbox'": lambda content: content["annotations"][1].pop("bbox"),
    "annotation 2 has no 'image_id'": lambda content: content["annotations"][1].pop("image_id"),
    r"annotation 2 has the bbox \[1, 2, 3\]": lambda content: content["annotations"][1].update(bbox=[1, 2, 3]),
    r"annotation 2 has RLE of size \[5, 6\].*\[90, 120\]": lambda content: content["annotations"][1].update(
        segmentation=RLE
    ),
    "annotation 2 has RLE of other than 10800 pixels": lambda content: content["annotations"][1].update(
        segmentation={"size": [90, 120], "counts": [3, 4]}
    ),
    "annotation 2 has RLE without": lambda content: content["annotations"][1].update(segmentation={"size": [90, 120]}),
    "annotation 2 has the segmentation": lambda content: content["annotations"][1].update(segmentation=[1.0, 2.0]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_named(tmp_path, message):
    name = annotated_images.write(tmp_path, coco())
    (tmp_path / "annotations_train.json").write_text(json.dumps(broken(WRONG[message])))
    with pytest.raises(UserError, match=rf"validation.source: .*annotations_train.json.*{message}"):
        open_annotated(name, key="validation")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_files_that_are_no_annotations_are_named(tmp_path, text):
    name = annotated_images.write(tmp_path, coco())
    (tmp_path / "annotations_train.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"data.source: .*annotations_train.json"):
        open_annotated(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder:x", "unknown source 'folder:x'; write coco:FOLDER"),
        ("coco:", "unknown source"),
        ("coco:/nowhere", "there is no folder /nowhere"),
        ("coco:/nowhere/a.json", "lacks the folder of images"),
        ("coco:/nowhere/a.json@/tmp", "there is no file /nowhere/a.json"),
    ],
)
def test_names_that_are_no_source_are_named(name, message):
    with pytest.raises(UserError, match=rf"data.source: .*{message}"):
        open_annotated(name)
    with pytest.raises(UserError, match=rf"^--source: .*{message}"):
        open_annotated(name, key="--")


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(UserError, match=r"validation.split: 'test'.*train or val"):
        opened(tmp_path, coco(), split="test", key="validation")


def test_a_tfds_data_set_has_boxes(tmp_path):
    import tensorflow_datasets as tfds

    content = coco()
    annotated_images.write(tmp_path, content)
    box = tfds.features.BBoxFeature()
    objects = {"bbox": box, "label": tfds.features.ClassLabel(names=["disc", "box"]), "is_crowd": np.bool_}
    features = {"image": tfds.features.Image(), "image/filename": tfds.features.Text(), "image/id": np.int64}
    features["objects"] = tfds.features.Sequence(objects)

    def examples():
        for image in content["images"]:
            found = []
            for entry in content["annotations"]:
                if entry["image_id"] == image["id"]:
                    x, y, width, height = entry["bbox"]
                    corners = [y / image["height"], x / image["width"]]
                    corners += [(y + height) / image["height"], (x + width) / image["width"]]
                    label = 0 if entry["category_id"] == 3 else 1
                    found.append({"bbox": tfds.features.BBox(*corners), "label": label, "is_crowd": entry["id"] == 1})
            path = tmp_path / "images" / image["file_name"]
            example = {"image": str(path), "image/filename": image["file_name"], "image/id": image["id"]}
            yield image["id"], {**example, "objects": found}

    class Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
        def _split_generators(self, _):
            return {"validation": examples()}

    builder = Builder(
        name="shapes",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={},
        data_dir=str(tmp_path / "tfds"),
        file_format="array_record",
    )
    builder.download_and_prepare()
    source = open_annotated("tfds:shapes", split="val", data_dir=str(tmp_path / "tfds"))
    own = open_annotated(f"coco:{tmp_path}")
    assert source.classes == own.classes
    assert not source.has_masks
    assert "TFDS stores no masks" in source.summary
    order = np.argsort(source.image_ids)
    assert source.object_counts[order].tolist() == [2, 3, 3, 3]  # one is a crowd region
    for index, row in enumerate(order):
        np.testing.assert_allclose(source.instances(row).boxes, own.instances(index).boxes[index == 0 :], atol=1e-4)
        assert source[row].data == own[index].data
        assert source[row].name.endswith(f"{index}.png")
    truth = pickle.loads(pickle.dumps(source)).ground_truth()
    assert [entry["iscrowd"] for entry in truth["annotations"]].count(1) == 1


def test_a_tfds_data_set_without_objects_is_named(tmp_path):
    write_data_set(open_source(f"folder:{write_folder(tmp_path / 'images', 2)}"), "plain", str(tmp_path / "tfds"))
    with pytest.raises(UserError, match=r"data.source: tfds:plain has no feature objects"):
        open_annotated("tfds:plain", data_dir=str(tmp_path / "tfds"))


def test_the_digest_changes_with_the_annotations(tmp_path):
    content = coco()
    first = opened(tmp_path, content).digest
    assert opened(tmp_path, content).digest == first
    content["annotations"][0]["bbox"][0] += 1
    assert opened(tmp_path, content).digest != first


JUNK = (None, "", "\ud800", [], [1], {}, math.nan, math.inf, -1, 0, 1e30, 2**70, 10**400, True, [[None] * 6], 1.5)


def places(value, path=()):
    """Yield the path of every part of a structure, of lists only the first two."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, part in items:
        yield from places(part, (*path, name))


def test_junk_anywhere_is_left_out_or_named(tmp_path):
    content = coco(objects=2)
    name = annotated_images.write(tmp_path, content)
    content["annotations"][1]["segmentation"] = {"size": [90, 120], "counts": [100, 50, 90 * 120 - 150]}
    for path in places(content):
        for junk in JUNK:
            changed = copy.deepcopy(content)
            part = changed
            for step in path[:-1]:
                part = part[step]
            part[path[-1]] = junk
            (tmp_path / "annotations_train.json").write_text(json.dumps(changed))
            with contextlib.suppress(UserError):
                source = open_annotated(name)
                for index in range(len(source)):
                    for mask in source.instances(index).masks:
                        if mask is not None:
                            rasterize(mask, *source.sizes[index].tolist())
