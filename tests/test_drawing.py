import io

import numpy as np
import pytest
from PIL import Image

from umae_jax.data.instances import Region
from umae_jax.drawing import CELL, MIN_SIDE, class_color, draw_instances, draw_sheet, encode_png

BOXES = np.array([[10, 20, 60, 80], [50, 10, 110, 40]], np.float32)
LABELS = np.array([0, 1])
CLASSES = ("cat", "dog")


def gray(height=90, width=120):
    return np.full((height, width, 3), 128, np.uint8)


@pytest.mark.parametrize("size", [(20, 24), (90, 120), (700, 900)])
def test_small_images_are_enlarged_so_that_captions_are_legible(size):
    picture = draw_instances(gray(*size), BOXES[:1] / 10, LABELS[:1], CLASSES)
    zoom = picture.shape[0] // size[0]
    assert picture.shape == (size[0] * zoom, size[1] * zoom, 3)
    assert min(picture.shape[:2]) >= MIN_SIDE
    assert zoom == 1 or (zoom - 1) * min(size) < MIN_SIDE
    caption = (picture == class_color(0)).all(-1)
    assert caption.any(0).sum() > 20  # columns with the colour of the class
    assert (picture == 255).all(-1).any()  # white text


def test_boxes_and_masks_are_drawn_where_they_are():
    mask = Region(np.ones((40, 30), np.uint8), 20, 30)
    picture = draw_instances(gray(600, 800), BOXES, LABELS, CLASSES, masks=[mask, None])
    inside, outside = picture[50, 40], picture[300, 400]
    assert (outside == 128).all()
    assert inside.tolist() == np.round(0.55 * 128 + 0.45 * np.array(class_color(0))).tolist()
    assert picture[50, 59].tolist() == list(class_color(0))  # right edge of the first box
    assert picture[39, 90].tolist() == list(class_color(1))
    assert (picture[60, 70] == 128).all()


def test_captions_do_not_cover_each_other_and_high_scores_come_first():
    box = np.array([[100, 100, 400, 400], [104, 104, 404, 404]], np.float32)
    image = gray(600, 800)
    both = draw_instances(image, box, LABELS, CLASSES, scores=np.array([0.2, 0.9]))
    captions = [(both[60:99] == class_color(label)).all(-1).sum() for label in LABELS]
    assert captions[0] == 0
    assert captions[1] > 100
    other = draw_instances(image, box, LABELS, CLASSES, scores=np.array([0.9, 0.2]))
    assert (other[60:99] == class_color(0)).all(-1).sum() > 100


def test_captions_stay_inside_the_picture():
    box = np.array([[790, 0, 800, 600], [0, 590, 5, 600]], np.float32)
    picture = draw_instances(gray(600, 800), box, LABELS, ("a long name of a class", "dog"))
    for label in LABELS:
        assert (picture == class_color(label)).all(-1).sum() > 400


def test_strips_are_enlarged_less_and_captions_may_hold_any_character():
    picture = draw_instances(np.zeros((2, 3000, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, int), ())
    assert picture.shape == (2, 3000, 3)
    draw_sheet([picture], ["a\nb\udce9.png"])


def test_images_without_objects_are_drawn():
    picture = draw_instances(gray(500, 600), np.zeros((0, 4)), np.zeros(0, int), CLASSES, scores=np.zeros(0))
    np.testing.assert_array_equal(picture, gray(500, 600))


def test_neighbouring_classes_have_different_colors():
    colors = np.array([class_color(label) for label in range(80)])
    assert len({tuple(color) for color in colors.tolist()}) == 80
    assert np.abs(np.diff(colors, axis=0)).sum(1).min() > 100


def test_a_sheet_holds_all_pictures_with_captions():
    pictures = [gray(100, 50), gray(2000, 1000), np.zeros((30, 40, 3), np.uint8)]
    sheet = draw_sheet(pictures, ["one", "x" * 500, ""])
    assert sheet.shape[1] < 2 * CELL[0] + 50
    assert (sheet == 128).all(-1).sum() > 100 * 50 + 400 * 200
    decoded = np.asarray(Image.open(io.BytesIO(encode_png(sheet))))
    np.testing.assert_array_equal(decoded, sheet)
