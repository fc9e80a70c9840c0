import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

from tests.images import picture
from umae_jax.config import IMAGENET_MEAN, IMAGENET_STD, default_config
from umae_jax.models.build import build_model
from umae_jax.pictures import PLAIN, STATISTICS, denormalize, make_illustrator, reconstruct


class Oracle:
    """A model that predicts its target exactly."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, images, mask):
        return jnp.zeros(()), self._model.target(images, mask)


SWIN = {"widths": (8, 16), "depths": (1, 2), "heads": (1, 2), "mlp_ratios": (4, 4), "window": 8, "position_width": 8}
VIT = {"widths": (8,), "depths": (1,), "heads": (2,), "patch": 4}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "secondary_ratio": 0.25}
KINDS = {  # size, method, and the fraction of sampled units that are hidden
    "uniform": ("swin_tiny", "um_mae", 0.25),
    "random": ("vit_small", "mae", 0.25),
    "simmim": ("swin_tiny", "simmim", 0),
}


def build(kind="uniform", channels=3, **changes):
    size, method, _ = KINDS[kind]
    config = default_config(size, method)
    config.image_size, config.dtype = (32, 32), "float32"
    config.data.mean, config.data.std = IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]
    small = SWIN if size == "swin_tiny" else VIT
    decoder = {} if method == "simmim" else DECODER
    config.model.update({**small, **decoder, "channels": channels, **changes})
    return build_model(config, nnx.Rngs(0))


def case(model):
    images = jnp.asarray(np.stack([picture(seed, 32, 32) for seed in range(2)]))
    return images, model.sample_mask(jax.random.split(jax.random.key(0), 2))


def panels_of(model, images, mask, statistics):
    return jax.jit(partial(reconstruct, model, statistics=statistics))(images, mask)


@pytest.mark.parametrize(("norm_pix_loss", "statistics"), [(False, "visible"), (True, "unit")])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_prediction_restores_the_image(kind, norm_pix_loss, statistics):
    model = build(kind, norm_pix_loss=norm_pix_loss)
    images, mask = case(model)
    panels = panels_of(Oracle(model), images, mask, statistics)
    shown = ~np.asarray(panels.hidden)[..., 0]
    difference = np.asarray(panels.pasted).astype(int) - np.asarray(images)
    assert np.abs(difference)[shown].max() <= 1
    assert (np.asarray(panels.pasted)[~shown] == 0).all()
    assert np.asarray(panels.hidden).mean() == KINDS[kind][2] / 4
    assert np.asarray(panels.sampled).mean() == 1 / 4
    visible = np.asarray(panels.sampled & ~panels.hidden)[..., 0]
    np.testing.assert_array_equal(np.asarray(panels.visible)[visible], np.asarray(images)[visible])
    assert (np.asarray(panels.visible)[~visible] == 0).all()
    np.testing.assert_allclose(panels.error, 0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_visible_units_do_not_leak_masked_pixels(kind):
    """Only visible pixels and the prediction reach the picture."""
    model = build(kind, norm_pix_loss=True)
    images, mask = case(model)
    noise = jax.random.randint(jax.random.key(5), images.shape, 0, 256).astype(jnp.uint8)
    flags = mask.assemble(~mask.hidden.repeat(4, 1).repeat(4, 2)[..., None], jnp.zeros((1, 1, 1, 1, 1), bool))
    others = jnp.where(flags, images, noise)  # equal in visible pixels
    shown = [panels_of(model, pixels, mask, "visible").predicted for pixels in (images, others)]
    np.testing.assert_array_equal(*shown)


def test_statistics_come_from_the_nearest_visible_units():
    """In an image with a dark left and a bright right half, each border takes the brightness of its own half."""
    model = build(secondary_ratio=0.0, norm_pix_loss=True)
    _, mask = case(model)
    columns = jnp.where(jnp.arange(32) < 16, 40, 220).astype(jnp.uint8)
    images = jnp.broadcast_to(columns[None, None, :, None], (2, 32, 32, 3))
    panels = panels_of(Oracle(model), images, mask, "visible")
    restored = np.where(panels.sampled, images, panels.predicted)
    border = np.array([0, 1, 2, 3, 28, 29, 30, 31])
    means = [np.asarray(pixels, np.float32).mean((0, 1, 3))[border] for pixels in (restored, images)]
    np.testing.assert_allclose(*means, atol=3)


@pytest.mark.parametrize(
    ("norm_pix_loss", "statistics", "channels"), [(True, "visible", 3), (True, "unit", 1), (False, "unit", 3)]
)
def test_the_caption_names_the_statistics(monkeypatch, norm_pix_loss, statistics, channels):
    graph, params = nnx.split(build(norm_pix_loss=norm_pix_loss, channels=channels))
    images = np.stack([picture(0, 32, 32)])[..., :channels]
    captions = []
    original = ImageDraw.ImageDraw.text

    def spy(self, at, text, *rest):
        captions.append(text)
        original(self, at, text, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    illustrate = make_illustrator(graph, images, seed=0, statistics=statistics)
    with Image.open(io.BytesIO(illustrate(params, "step 7"))) as sheet:
        assert sheet.width > 4 * 200
    caption = next(text for text in captions if text.startswith("step 7"))
    assert "over the units not sampled of this image, in " in caption
    assert caption.endswith("pixels normalised per unit" if norm_pix_loss else "normalised pixels")
    assert (STATISTICS[statistics] if norm_pix_loss else PLAIN) in captions


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_the_error_of_a_picture_is_the_loss_of_its_images(kind, norm_pix_loss):
    model = build(kind, norm_pix_loss=norm_pix_loss)
    images, mask = case(model)
    error = panels_of(model, images, mask, "visible").error
    np.testing.assert_allclose(error.mean(), jax.jit(model)(images, mask)[0], rtol=1e-5)


def test_denormalize_inverts_normalize():
    images = jnp.arange(256, dtype=jnp.uint8)[None, :, None, None].repeat(3, -1)
    pixels = build().encoder.normalize(images)
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels[0, 255, 0], (1 - np.array(IMAGENET_MEAN)) / IMAGENET_STD, rtol=1e-5)
    np.testing.assert_array_equal(denormalize(pixels, IMAGENET_MEAN, IMAGENET_STD), images)
