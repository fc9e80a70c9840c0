"""Mask targets and pasted masks, against mmdet's numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.detection.golden import assert_close, load
from umae_jax.detection import coco
from umae_jax.detection.masks import aligned_masks, mask_targets, paste


def test_targets_of_whole_masks_equal_the_golden_numbers():
    # A crop along the border of the image is the whole mask. Boxes that leave the image differ: there the source
    # repeats the pixels of the border, here masks end.
    golden = load("c_mask")
    boxes = golden["boxes"]
    own = ((boxes >= 0) & (boxes <= [160, 128, 160, 128])).all(1)
    assert own.sum() >= 10
    crops = jnp.asarray(255 * golden["masks"][golden["gt_inds"][own]])
    image = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 160.0, 128.0]), (own.sum(), 4))
    coverage = np.asarray(aligned_masks(crops, image, jnp.asarray(boxes[own]), 28))
    expected = golden["target28_soft"][own]
    inner = ((boxes[own] >= 1) & (boxes[own] <= [159, 127, 159, 127])).all(1)  # samples at the border see its zeros
    assert_close("coverage", coverage[inner], expected[inner])
    targets = mask_targets(crops, image, jnp.asarray(boxes[own]))
    differing = np.asarray(targets) != golden["target28"][own]
    print("differing target pixels:", differing.mean())
    assert (np.abs(expected[differing] - 0.5) < 1e-4).all()


def crop_to_box(mask, box, size=112):
    """Return a mask's part in a box at another size, uint8: areas of pixels, by way of a much finer image."""
    fine = 8

    def pixels(low, high, limit):
        place = low + (np.arange(size * fine) + 0.5) / (size * fine) * (high - low)
        return np.clip(place.astype(int), 0, limit - 1), (place >= 0) & (place < limit)

    (rows, row_inside), (columns, column_inside) = (pixels(box[1 - k], box[3 - k], mask.shape[k]) for k in (0, 1))
    values = mask[rows][:, columns] * (row_inside[:, None] & column_inside)
    return (255 * values.reshape(size, fine, size, fine).mean((1, 3)) + 0.5).astype(np.uint8)


def test_targets_of_crops_differ_in_few_pixels_of_the_golden_numbers():
    golden = load("c_mask")
    crops, gt_boxes = [], []
    for mask in golden["masks"]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        gt_boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        crops.append(crop_to_box(mask, gt_boxes[-1]))
    own = golden["gt_inds"]
    arrays = (np.stack(crops)[own], np.asarray(gt_boxes, np.float32)[own], golden["boxes"])
    targets = jax.jit(mask_targets)(*map(jnp.asarray, arrays))
    differing = (np.asarray(targets) != golden["target28"]).mean()
    print("differing target pixels of crops:", differing)
    assert differing < 0.005
    assert 0.1 < np.asarray(targets).mean() < 0.9


def test_objects_and_boxes_without_area_have_finite_targets():
    crops = jnp.zeros((2, 8, 8), jnp.uint8)
    boxes = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 30.0, 20.0]])
    assert not mask_targets(crops, jnp.zeros((2, 4)), boxes).any()
    assert not mask_targets(crops + jnp.uint8(255), boxes[::-1], jnp.zeros((2, 4))).any()


def paste_on_host(probabilities, box, height, width):
    """Return the mask of the host, which holds the pixels of the box only, in the whole image."""
    mask, region = np.zeros((height, width), bool), coco.paste(probabilities, box, height, width)
    rows, columns = region.pixels.shape
    mask[region.top : region.top + rows, region.left : region.left + columns] = region.pixels
    return mask


def test_pasted_masks_equal_the_golden_numbers():
    golden = load("c_mask")
    probabilities, boxes = jnp.asarray(golden["paste_prob28"][:, 0]), jnp.asarray(golden["paste_boxes"])
    pasted = np.asarray(paste(probabilities, boxes, 128, 160))
    assert_close("pasted, float16", pasted, golden["paste_full"].astype(np.float32), 1e-3)
    assert_close("pasted, one row", pasted[:, 24], golden["paste_full_rows64"])
    np.testing.assert_allclose(paste(probabilities[2], boxes[2], 128, 160), pasted[2], atol=1e-6)
    expected = np.unpackbits(golden["paste_bin"], axis=-1)[..., :160].astype(bool)
    np.testing.assert_array_equal(pasted >= 0.5, expected)
    for k in range(len(boxes)):
        mask = paste_on_host(np.asarray(probabilities[k]), np.asarray(boxes[k]), 128, 160)
        np.testing.assert_array_equal(mask, expected[k])


def test_the_host_pastes_the_same_masks_everywhere():
    rng = np.random.default_rng(0)
    corners = rng.uniform(-15, 50, (60, 2, 2))
    corners.sort(axis=1)
    boxes = corners.reshape(-1, 4).astype(np.float32)
    boxes[:4] = [[-90, -90, 200, 200], [-30, -30, -10, -10], [60, 60, 90, 90], [5, 5, 5, 5]]
    probabilities = rng.random((60, 7, 7)).astype(np.float32)
    probabilities[::2] = 1
    expected = np.asarray(paste(jnp.asarray(probabilities), jnp.asarray(boxes), 30, 40))
    for k in range(60):
        mask = paste_on_host(probabilities[k], boxes[k], 30, 40)
        clear = np.abs(expected[k] - 0.5) > 1e-4
        np.testing.assert_array_equal(mask[clear], (expected[k] >= 0.5)[clear])
