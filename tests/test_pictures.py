import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

from tests import tiny
from tests.images import picture
from umae_jax.data.on_device import IMAGENET_MEAN, IMAGENET_STD, denormalize, normalize, random_flip, sample_keys
from umae_jax.masking import assemble, sample_uniform_mask
from umae_jax.models.build import build_autoencoder
from umae_jax.pictures import PLAIN, STATISTICS, make_illustrator, reconstruct

NORMALIZATION = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class Oracle:
    """Stands in for a model that predicts its target exactly."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, images, mask):
        return jnp.zeros(()), self._model.target(images, mask.offset)


def build(normalize_target):
    config = tiny.get_config()
    config.model.normalize_target = normalize_target
    return build_autoencoder(config, nnx.Rngs(0))


@pytest.fixture
def case():
    images = jnp.asarray(np.stack([picture(seed, 32, 32) for seed in range(2)]))
    mask = sample_uniform_mask(jax.random.key(0), 2, (4, 4), 0.25)
    return images, mask


@pytest.mark.parametrize(("normalize_target", "statistics"), [(False, "visible"), (True, "unit")])
def test_an_exact_prediction_restores_the_picture(case, normalize_target, statistics):
    images, mask = case
    panels = reconstruct(Oracle(build(normalize_target)), images, mask, statistics=statistics, **NORMALIZATION)
    shown = ~np.asarray(panels.hidden)
    difference = np.asarray(panels.pasted).astype(int) - np.asarray(images)
    assert np.abs(difference)[shown].max() <= 1
    assert (np.asarray(panels.pasted)[~shown] == 0).all()
    assert np.asarray(panels.hidden).mean() == 1 / 16
    assert np.asarray(panels.sampled).mean() == 1 / 4
    seen = np.asarray(panels.sampled & ~panels.hidden)
    np.testing.assert_array_equal(np.asarray(panels.seen)[seen], np.asarray(images)[seen])
    assert (np.asarray(panels.seen)[~seen] == 0).all()
    np.testing.assert_allclose(panels.error, 0, atol=1e-9)


def test_statistics_of_visible_units_do_not_leak_what_was_masked(case):
    """Only visible pixels and the model's prediction may reach the picture."""
    images, mask = case
    noise = jax.random.randint(jax.random.key(5), images.shape, 0, 256).astype(jnp.uint8)
    flags = assemble(~mask.hidden.repeat(4, 1).repeat(4, 2)[..., None], jnp.zeros((1, 1, 1, 1, 1), bool), mask.offset)
    others = jnp.where(flags, images, noise)  # the same where visible
    model = build(True)
    shown = []
    for pixels in (images, others):
        panels = reconstruct(model, pixels, mask, statistics="visible", **NORMALIZATION)
        shown.append(np.asarray(panels.predicted))
    np.testing.assert_array_equal(*shown)


def test_statistics_of_visible_units_are_the_nearest(case):
    """On an image dark to the left and bright to the right, each border takes its own side's colour."""
    _, mask = case
    mask = mask._replace(hidden=jnp.zeros_like(mask.hidden))
    columns = jnp.where(jnp.arange(32) < 16, 40, 220).astype(jnp.uint8)
    images = jnp.broadcast_to(columns[None, None, :, None], (2, 32, 32, 3))
    panels = reconstruct(Oracle(build(True)), images, mask, statistics="visible", **NORMALIZATION)
    restored = np.where(np.asarray(panels.sampled)[..., None], images, panels.predicted)
    means = [normalize(jnp.asarray(pixels), **NORMALIZATION).mean((0, 1, 3)) for pixels in (restored, images)]
    border = np.array([0, 1, 2, 3, 28, 29, 30, 31])
    np.testing.assert_allclose(means[0][border], means[1][border], atol=0.05)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("normalize_target", "statistics"), [(True, "visible"), (True, "unit"), (False, "unit")])
def test_the_caption_says_how_it_was_de_normalised(monkeypatch, channels, normalize_target, statistics):
    config = tiny.get_config()
    config.model.normalize_target = normalize_target
    config.model.channels = channels
    graph, params = nnx.split(build_autoencoder(config, nnx.Rngs(0)))
    images = np.stack([picture(0, 32, 32)])[..., :channels]
    captions = []
    original = ImageDraw.ImageDraw.text

    def spy(self, at, text, *rest):
        captions.append(text)
        original(self, at, text, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    illustrate = make_illustrator(
        graph, images, seed=0, mean=IMAGENET_MEAN[:channels], std=IMAGENET_STD[:channels], statistics=statistics
    )
    with Image.open(io.BytesIO(illustrate(params, "step 7"))) as sheet:
        assert sheet.width > 4 * 200
    caption = next(text for text in captions if text.startswith("step 7"))
    assert caption.endswith(STATISTICS[statistics] if normalize_target else PLAIN)


def test_normalisation_and_its_inverse():
    images = jnp.arange(256, dtype=jnp.uint8)[None, :, None, None].repeat(3, -1)
    pixels = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels[0, 255, 0], (1 - np.array(IMAGENET_MEAN)) / IMAGENET_STD, rtol=1e-5)
    np.testing.assert_array_equal(denormalize(pixels, IMAGENET_MEAN, IMAGENET_STD), images)


def test_flips_belong_to_the_sample_and_come_half_the_time():
    keys = sample_keys(3, jnp.arange(1000, dtype=jnp.uint32))
    images = jnp.broadcast_to(jnp.arange(4, dtype=jnp.uint8)[None, None, :, None], (1000, 2, 4, 1))
    flipped = np.asarray(random_flip(images, keys))[:, 0, 0, 0] == 3
    assert 430 < flipped.sum() < 570
    some = sample_keys(3, jnp.array([700, 5], jnp.uint32))
    np.testing.assert_array_equal(np.asarray(random_flip(images[:2], some))[:, 0, 0, 0] == 3, flipped[[700, 5]])
