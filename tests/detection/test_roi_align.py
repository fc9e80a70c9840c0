"""RoIAlign, against torchvision's numbers and a plain sum over all samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.detection.golden import assert_close, load
from umae_jax.detection import roi_align as module
from umae_jax.detection.roi_align import cut, roi_align, roi_align_whole, roi_levels

SHAPES, STRIDES = ((23, 31), (12, 16), (6, 8)), (4, 8, 16)


def plain_weights(low, high, stride, limit, size):
    """Return the weights [size, limit] of one box along one axis by a loop over its samples."""
    start, end = low / stride - 0.5, high / stride - 0.5
    bin_size = (end - start) / size
    samples = max(int(np.ceil(bin_size)), 0)
    weights = np.zeros((size, limit))
    for bin_number, sample in np.ndindex(size, samples):
        place = start + bin_size * (bin_number + (sample + 0.5) / samples)
        if -1 <= place <= limit:
            distance = np.abs(np.clip(place, 0, limit - 1) - np.arange(limit))
            weights[bin_number] += np.maximum(1 - distance, 0) / samples
    return weights


def plain_matrices(boxes, levels, size):
    """Return, for each level, the weights of rows and of columns of all boxes; zeros for those of other levels."""
    result = []
    for level, (shape, stride) in enumerate(zip(SHAPES, STRIDES, strict=True)):
        rows, columns = (np.zeros((len(boxes), size, side), np.float32) for side in shape)
        for k in np.flatnonzero(levels == level):
            x1, y1, x2, y2 = np.asarray(boxes[k], np.float64)
            rows[k] = plain_weights(y1, y2, stride, shape[0], size)
            columns[k] = plain_weights(x1, x2, stride, shape[1], size)
        result.append((rows, columns))
    return result


def plain(maps, matrices):
    pairs = zip(maps, matrices, strict=True)
    return sum(jnp.einsum("rph,hwc,rqw->rpqc", rows, level, columns) for level, (rows, columns) in pairs)


def random_case(seed, count=40):
    """Return maps, boxes of all kinds, and levels."""
    rng = np.random.default_rng(seed)
    maps = [rng.normal(size=(*shape, 5)).astype(np.float32) for shape in SHAPES]
    corners = rng.uniform(-30, 150, (count, 2, 2))
    corners.sort(axis=1)
    boxes = corners.reshape(-1, 4)
    boxes[:9] = [
        [-500, 20, 500, 23],  # 1000 x 3
        [40.5, -400, 42, 600],
        [-3000, -2000, 3000, 2000],
        [-50, -50, -20, -20],  # outside
        [300, 10, 400, 50],
        [20, 30, 20, 60],  # empty
        [60, 60, 40, 40],
        [0, 0, 0, 0],
        [10, 10, 10.001, 10.001],
    ]
    boxes[9:14] = [[8, 4, 36, 32], [8, 4, 64, 60], [0, 0, 124, 92], [4, 4, 116, 60], [100, 70, 200, 200]]
    levels = rng.integers(0, 3, count)
    return maps, boxes.astype(np.float32), levels.astype(np.int32)


def align_cut(maps, boxes, levels, **options):
    """Align boxes on maps [B, H, W, C] through their tiles."""
    return roi_align(cut(maps, STRIDES[: len(maps)]), boxes, levels, **options)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [7, 14])
def test_features_and_gradients_equal_the_golden_numbers(size, whole):
    golden = load("c_roialign")
    maps = jnp.asarray(golden["feat"].transpose(0, 2, 3, 1))
    rois, name = golden["rois"], f"out{size}_sr0_aligned"
    cotangent = golden[f"{name}_ct"].transpose(0, 2, 3, 1)
    for image in (0, 1):
        own = rois[:, 0] == image
        boxes = jnp.asarray(rois[own, 1:])[None]

        def align(level, boxes=boxes):
            if whole:
                return roi_align_whole(level, boxes, size=size, stride=8, chunk=4)
            return roi_align(cut([level], [8]), boxes, jnp.zeros(boxes.shape[:2], jnp.int32), size=size, chunk=4)

        features, pullback = jax.vjp(align, maps[image : image + 1])
        assert_close(f"{name} of image {image}", features[0], golden[name].transpose(0, 2, 3, 1)[own])
        (gradient,) = pullback(jnp.asarray(cotangent[own])[None])
        expected = golden[f"{name}_gfeat"].transpose(0, 2, 3, 1)[image]
        assert_close(f"gradient of {name} of image {image}", gradient[0], expected, 1e-3)


def test_levels_equal_the_golden_numbers():
    golden = load("c_roialign")
    np.testing.assert_array_equal(roi_levels(jnp.asarray(golden["lvl_rois"][:, 1:])), golden["lvl"])
    assert roi_levels(jnp.asarray([[5.0, 5, 5, 5], [9, 9, 3, 20]])).tolist() == [0, 0]


def check_exact(align, maps, matrices):
    """Compare features and gradients of all boxes with plain sums."""
    features, pullback = jax.vjp(jax.jit(align), maps)
    expected, plain_pullback = jax.vjp(lambda maps: plain(maps, matrices), maps)
    assert_close("features", features, expected, 1e-5)
    assert not np.asarray(features[3:8]).any()
    assert np.asarray(features[8:14]).any(axis=(1, 2, 3)).all()
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=features.shape), jnp.float32)
    for gradient, own in zip(pullback(cotangent)[0], plain_pullback(cotangent)[0], strict=True):
        assert_close("gradient", gradient, own, 1e-5)


@pytest.mark.parametrize(
    ("size", "tile", "window", "chunk"), [(7, 8, 4, 32), (7, 5, 1, 7), (3, 1, 1, 40), (14, 3, 3, 64)]
)
def test_all_boxes_are_exact_for_every_window(monkeypatch, size, tile, window, chunk):
    monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(module, "WINDOW", window)
    maps, boxes, levels = random_case(size)

    def align(maps):
        batch = [level[None] for level in maps]
        return align_cut(batch, jnp.asarray(boxes)[None], jnp.asarray(levels)[None], size=size, chunk=chunk)[0]

    check_exact(align, maps, plain_matrices(boxes, levels, size))


@pytest.mark.parametrize(("size", "chunk"), [(7, 128), (14, 7)])
def test_all_boxes_are_exact_on_a_whole_map(size, chunk):
    (level, *_), boxes, _ = random_case(size)

    def align(maps):
        return roi_align_whole(maps[0][None], jnp.asarray(boxes)[None], size=size, stride=STRIDES[0], chunk=chunk)[0]

    check_exact(align, [level], plain_matrices(boxes, np.zeros(len(boxes), np.int32), size)[:1])


def test_pooled_features_are_means_of_more_bins():
    (level, *_), boxes, _ = random_case(3)
    align = partial(roi_align_whole, jnp.asarray(level)[None], jnp.asarray(boxes)[None], stride=4)
    bins = align(size=14).reshape(1, len(boxes), 7, 2, 7, 2, -1)
    assert_close("pooled", align(size=7, pool=2), bins.mean((3, 5)), 1e-5)


@pytest.mark.parametrize("count", [0, 5])
def test_any_number_of_boxes_also_within_jit(count):
    maps, boxes, levels = random_case(6)
    tiles = cut([level[None] for level in maps], STRIDES)
    some = jnp.asarray(boxes)[None, 9 : 9 + count], jnp.asarray(levels)[None, 9 : 9 + count]
    features = jax.jit(roi_align, static_argnames=("size", "chunk"))(tiles, *some, size=7, chunk=4)
    assert features.shape == (1, count, 7, 7, 5)
    whole = [
        roi_align_whole(level[None], some[0], size=7, stride=stride)
        for level, stride in zip(maps, STRIDES, strict=True)
    ]
    expected = sum(jnp.where((some[1] == k)[..., None, None, None], one, 0) for k, one in enumerate(whole))
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_batch_equals_its_images_with_values_and_gradients(monkeypatch):
    # Image 1 needs many more windows than image 0.
    monkeypatch.setattr(module, "TILE", 4)
    monkeypatch.setattr(module, "WINDOW", 1)
    maps, boxes, levels = (list(part) for part in zip(random_case(1), random_case(2), strict=True))
    boxes[0] = np.concatenate([boxes[0][9:], boxes[0][9:18]]) / 8
    boxes, levels, maps = jnp.stack(boxes), jnp.stack(levels), [jnp.stack(level) for level in zip(*maps, strict=True)]

    def loss(maps, boxes, levels):
        return jnp.sin(align_cut(maps, boxes, levels, size=7, chunk=16)).sum()

    evaluate = jax.jit(jax.value_and_grad(loss))
    value, gradients = evaluate(maps, boxes, levels)
    summed = 0
    for image in (0, 1):
        own = slice(image, image + 1)
        part, own_gradients = evaluate([level[own] for level in maps], boxes[own], levels[own])
        summed += part
        for gradient, expected in zip(gradients, own_gradients, strict=True):
            assert_close("gradient of a batch", gradient[own], expected, 1e-5)
    np.testing.assert_allclose(value, summed, rtol=1e-5)


def test_bfloat16_features_are_summed_in_float32():
    maps, boxes, levels = random_case(4)
    maps = [jnp.asarray(level, jnp.bfloat16)[None] for level in maps]
    boxes, levels = jnp.asarray(boxes)[None], jnp.asarray(levels)[None]
    check_bfloat16(lambda maps: align_cut(maps, boxes, levels, size=7), maps, feature_atol=1e-6, gradient_atol=1e-6)


def test_a_whole_map_in_bfloat16_is_close_to_float32():
    """Weights and rows are rounded, and the gradient of each chunk is."""
    (level, *_), boxes, _ = random_case(4)
    boxes = jnp.asarray(boxes)[None]
    maps = [jnp.asarray(level, jnp.bfloat16)[None]]

    def align(maps):
        return roi_align_whole(maps[0], boxes, size=7, stride=4, chunk=8)

    check_bfloat16(align, maps, feature_atol=2**-7, gradient_atol=2**-5)


def check_bfloat16(align, maps, feature_atol, gradient_atol):
    """Compare features and gradients with those of the same maps in float32."""
    features, pullback = jax.vjp(jax.jit(align), maps)
    expected, expected_pullback = jax.vjp(jax.jit(align), [level.astype(jnp.float32) for level in maps])
    assert features.dtype == jnp.bfloat16
    np.testing.assert_allclose(features.astype(jnp.float32), expected, rtol=2**-8, atol=feature_atol)
    cotangent = jnp.ones_like(features)
    for gradient, own in zip(pullback(cotangent)[0], expected_pullback(cotangent.astype(jnp.float32))[0], strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(jnp.float32), own, rtol=2**-7, atol=gradient_atol)


@pytest.mark.parametrize("whole", [False, True])
def test_boxes_have_no_gradient(whole):
    maps, boxes, levels = random_case(5)
    maps, levels = [jnp.asarray(level)[None] for level in maps], jnp.asarray(levels)[None]

    def loss(boxes):
        if whole:
            return roi_align_whole(maps[0], boxes, size=7, stride=4).sum()
        return align_cut(maps, boxes, levels, size=7).sum()

    assert not jax.grad(loss)(jnp.asarray(boxes)[None]).any()
