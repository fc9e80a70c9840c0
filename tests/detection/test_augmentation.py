import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umae_jax.detection.augmentation import View, detect_in_views
from umae_jax.detection.cascade import CascadeOptions
from umae_jax.detection.detector import Detector
from umae_jax.detection.rpn import RpnOptions

WIDTH = 8
SIZES = np.array([[96, 128], [80, 100]], np.int32)


class Backbone(nnx.Module):
    """Mean pixels of each cell, in place of an encoder."""

    widths = 4 * (WIDTH,)

    def __call__(self, images, image_size, drop_keys):
        x = images.astype(jnp.float32) / 255 - 0.5
        x = jnp.tile(x, (1, 1, 1, 3))[..., :WIDTH]

        def pool(stride):
            batch, height, width, channels = x.shape
            return x.reshape(batch, height // stride, stride, width // stride, stride, channels).mean((2, 4))

        return tuple(map(pool, (4, 8, 16, 32)))


@pytest.fixture(scope="module")
def detector():
    cascade = CascadeOptions(semantic_classes=0, box_convs=0, box_hidden=16, detections=10)
    rpn = RpnOptions(anchor_scale=4, test_proposals=30)
    model = Detector(Backbone(), 3, width=WIDTH, rpn=rpn, cascade=cascade, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    scaled = jax.tree.map(lambda x: 3 * x, params)  # larger numbers, so that scores and boxes differ
    return nnx.merge(graph, scaled)


def images_of(sizes):
    rng = np.random.default_rng(0)
    images = np.zeros((2, 96, 128, 3), np.uint8)
    for image, (height, width) in zip(images, sizes, strict=True):
        coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        image[:height, :width] = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    return images


def assert_same(ours, theirs):
    assert ours.valid.any()
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
    np.testing.assert_allclose(ours.masks, theirs.masks, atol=1e-3)


def test_one_view_detects_what_the_detector_does(detector):
    images, sizes = jnp.asarray(images_of(SIZES)), jnp.asarray(SIZES)
    assert_same(detect_in_views(detector, [View(images, sizes)]), detector(images, sizes))


def test_a_mirrored_view_detects_what_the_detector_does_in_mirrored_images(detector):
    images, sizes = images_of(SIZES), jnp.asarray(SIZES)
    mirrored = np.zeros_like(images)
    for image, other, (height, width) in zip(images, mirrored, SIZES, strict=True):
        other[:height, :width] = image[:height, :width][:, ::-1]
    ours = detect_in_views(detector, [View(jnp.asarray(mirrored), sizes, flip=True)])
    theirs = detector(jnp.asarray(images), sizes)
    x1, y1, x2, y2 = jnp.moveaxis(theirs.boxes, -1, 0)
    width = SIZES[:, 1:].astype(np.float32)
    boxes = jnp.where(theirs.valid[..., None], jnp.stack([width - x2, y1, width - x1, y2], -1), 0)
    assert_same(ours, theirs._replace(boxes=boxes, masks=theirs.masks[..., ::-1]))


def test_scores_are_means_over_views_of_the_same_boxes(detector):
    images, sizes = jnp.asarray(images_of(SIZES)), jnp.asarray(SIZES)
    view = View(images, sizes)
    assert_same(detect_in_views(detector, [view, view]), detector(images, sizes))
    other = view._replace(images=255 - images)
    one_way, other_way = (detect_in_views(detector, views) for views in ([view, other], [other, view]))
    assert_same(one_way, other_way)
    assert not np.allclose(one_way.scores, detector(images, sizes).scores, rtol=1e-3)
    larger = images.repeat(2, 1).repeat(2, 2)
    both = detect_in_views(detector, [view, View(larger, 2 * sizes), view._replace(flip=True)])
    assert both.valid.any()
    limits = np.tile(SIZES[:, ::-1], 2)[:, None]
    assert (np.asarray(both.boxes) <= limits + 1e-3).all()
    assert (np.asarray(both.boxes) >= -1e-3).all()
