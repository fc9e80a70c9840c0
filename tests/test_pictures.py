import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

from tests import tiny
from tests.images import picture
from umae_jax.config import IMAGENET_MEAN, IMAGENET_STD
from umae_jax.data.on_device import denormalize, normalize, random_flip, sample_keys
from umae_jax.models.build import build_model
from umae_jax.pictures import PLAIN, STATISTICS, make_illustrator, reconstruct

NORMALIZATION = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class Oracle:
    """Stands in for a model that predicts its target exactly."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, images, mask):
        return jnp.zeros(()), self._model.target(images, mask)


KINDS = {  # each with a share of its sampled units that are hidden
    "uniform": ({}, 0.25),
    "random": (
        {"method": "mae", "encoder": "vit", "widths": (8,), "depths": (1,), "heads": (2,), "mlp_ratios": (4,)}
        | {"decoder_factor": 1},
        0.25,
    ),
    "simmim": ({"method": "simmim"}, 0),
}


def build(kind="uniform", **changes):
    config = tiny.get_config()
    config.model.update(KINDS[kind][0] | changes)
    return build_model(config, nnx.Rngs(0))


def case(model):
    images = jnp.asarray(np.stack([picture(seed, 32, 32) for seed in range(2)]))
    return images, model.sample_mask(jax.random.split(jax.random.key(0), 2))


def panels_of(model, images, mask, statistics):
    show = partial(reconstruct, model, statistics=statistics, **NORMALIZATION)
    return jax.jit(show)(images, mask)


@pytest.mark.parametrize(("norm_pix_loss", "statistics"), [(False, "visible"), (True, "unit")])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_prediction_restores_the_picture(kind, norm_pix_loss, statistics):
    model = build(kind, norm_pix_loss=norm_pix_loss)
    images, mask = case(model)
    panels = panels_of(Oracle(model), images, mask, statistics)
    shown = ~np.asarray(panels.hidden)
    difference = np.asarray(panels.pasted).astype(int) - np.asarray(images)
    assert np.abs(difference)[shown].max() <= 1
    assert (np.asarray(panels.pasted)[~shown] == 0).all()
    assert np.asarray(panels.hidden).mean() == KINDS[kind][1] / 4
    assert np.asarray(panels.sampled).mean() == 1 / 4
    seen = np.asarray(panels.sampled & ~panels.hidden)
    np.testing.assert_array_equal(np.asarray(panels.seen)[seen], np.asarray(images)[seen])
    assert (np.asarray(panels.seen)[~seen] == 0).all()
    np.testing.assert_allclose(panels.error, 0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_visible_units_do_not_leak_what_was_masked(kind):
    """Only visible pixels and the model's prediction may reach the picture."""
    model = build(kind, norm_pix_loss=True)
    images, mask = case(model)
    noise = jax.random.randint(jax.random.key(5), images.shape, 0, 256).astype(jnp.uint8)
    flags = mask.assemble(~mask.hidden.repeat(4, 1).repeat(4, 2)[..., None], jnp.zeros((1, 1, 1, 1, 1), bool))
    others = jnp.where(flags, images, noise)  # the same where visible
    shown = [panels_of(model, pixels, mask, "visible").predicted for pixels in (images, others)]
    np.testing.assert_array_equal(*shown)


def test_statistics_of_visible_units_are_the_nearest():
    """On an image dark to the left and bright to the right, each border takes its own side's colour."""
    model = build(secondary_ratio=0.0, norm_pix_loss=True)
    _, mask = case(model)
    columns = jnp.where(jnp.arange(32) < 16, 40, 220).astype(jnp.uint8)
    images = jnp.broadcast_to(columns[None, None, :, None], (2, 32, 32, 3))
    panels = panels_of(Oracle(model), images, mask, "visible")
    restored = np.where(np.asarray(panels.sampled)[..., None], images, panels.predicted)
    means = [normalize(jnp.asarray(pixels), **NORMALIZATION).mean((0, 1, 3)) for pixels in (restored, images)]
    border = np.array([0, 1, 2, 3, 28, 29, 30, 31])
    np.testing.assert_allclose(means[0][border], means[1][border], atol=0.05)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm_pix_loss", "statistics"), [(True, "visible"), (True, "unit"), (False, "unit")])
def test_the_caption_says_how_it_was_de_normalised(monkeypatch, channels, norm_pix_loss, statistics):
    graph, params = nnx.split(build(norm_pix_loss=norm_pix_loss, channels=channels))
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
    assert caption.endswith(STATISTICS[statistics] if norm_pix_loss else PLAIN)


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
