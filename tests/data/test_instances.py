from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from umae_jax.data import instances
from umae_jax.data.instances import Polygons, Region, RunLengths, crop_mask, encode, rasterize, window
from umae_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden_numbers" / "detection"


def draw_mask(seed, height, width):
    """Draw a mask: noise of some density, or a rectangle that may touch the borders."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        return (rng.random((height, width)) < rng.choice([0, 0.1, 0.5, 0.9, 1])).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(0, height), rng.integers(0, width)
    mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = 1
    return mask


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 50))
def test_run_lengths_are_read_and_written_as_coco_does(seed, height, width):
    mask = draw_mask(seed, height, width)
    counts = reference.encode(np.asfortranarray(mask))["counts"]
    region = rasterize(RunLengths(counts), height, width)
    np.testing.assert_array_equal(window(region, 0, 0, width, height), mask)
    for whole_or_part in (region, Region(mask, 0, 0)):
        assert encode(whole_or_part, height, width) == {"size": [height, width], "counts": counts.decode()}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_polygons_have_the_pixels_of_coco_also_across_the_border(seed, count):
    rng = np.random.default_rng(seed)
    height, width = map(int, rng.integers(8, 120, 2))
    parts = tuple(rng.uniform(-20, 140, 2 * rng.integers(3, 9)).astype(np.float32) for _ in range(count))
    whole = reference.merge(reference.frPyObjects([part.astype(float).tolist() for part in parts], height, width))
    region = rasterize(Polygons(parts), height, width)
    np.testing.assert_array_equal(window(region, 0, 0, width, height), reference.decode(whole))


@pytest.mark.parametrize("counts", [b"", b"\x00", b"Z", b"0~", b"o" * 20 + b"0"])
def test_run_lengths_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match="run lengths"):
        rasterize(RunLengths(counts), 4, 4)


def test_run_lengths_of_another_size_are_refused():
    counts = reference.encode(np.asfortranarray(np.ones((4, 5), np.uint8)))["counts"]
    with pytest.raises(ValueError, match="20 pixels of 6 x 4"):
        rasterize(RunLengths(counts), 4, 6)


def test_the_box_of_a_region_is_the_smallest():
    pixels = np.zeros((6, 8), np.uint8)
    pixels[2:4, 3:7] = 1
    assert Region(pixels, 10, 20).box == (13, 22, 17, 24)
    assert Region(pixels[:2], 10, 20).box == (0, 0, 0, 0)


def test_crops_agree_with_the_mask_targets_of_the_reference():
    """A crop at the size of the target is the target, but for single pixels."""
    with np.load(GOLDEN / "c_mask.npz") as golden:
        masks, boxes, gts, targets = (golden[name] for name in ("masks", "boxes", "gt_inds", "target28"))
    height, width = masks.shape[1:]
    wrong = []
    for box, gt, target in zip(boxes, gts, targets, strict=True):
        box = box.clip(0, [width, height, width, height])
        crop = crop_mask(Region(masks[gt].astype(np.uint8), 0, 0), box, height, width, 28)
        wrong.append((crop >= 128) != (target > 0.5))
    assert np.mean(wrong) < 0.002


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_the_mean_of_a_crop_is_the_covered_share_of_its_box(seed):
    rng = np.random.default_rng(seed)
    height, width = 80, 100
    mask = np.zeros((height, width), np.uint8)
    mask[20:60, 30:70] = 1
    x1, y1 = rng.uniform(0, 50), rng.uniform(0, 40)
    x2, y2 = x1 + rng.uniform(5, 50), y1 + rng.uniform(5, 40)
    covered = max(0, min(x2, 70) - max(x1, 30)) * max(0, min(y2, 60) - max(y1, 20))
    crop = crop_mask(Region(mask[15:65, 25:75], 25, 15), np.array([x1, y1, x2, y2]), height, width)
    assert (crop.shape, crop.dtype) == ((112, 112), np.uint8)
    assert crop.mean() / 255 == pytest.approx(
        covered / ((x2 - x1) * (y2 - y1)), abs=0.03
    )  # filters are as wide as a pixel


def test_a_mask_at_the_border_of_its_image_fills_its_crop():
    crop = crop_mask(Region(np.ones((40, 30), np.uint8), 0, 0), np.array([0, 0, 30, 40]), 40, 30)
    assert crop.min() == 255


def test_the_missing_package_is_named(monkeypatch):
    instances.mask_api.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval.core.mask", None)
    with pytest.raises(UserError, match=r"umae_jax\[detect\]"):
        instances.mask_api()
