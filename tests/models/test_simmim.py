"""SimMIM: the encoder sees the whole image except masked units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import build, encode, pixel_gradient, random_case, random_images, run
from umae_jax.masking import sample_uniform_mask

NAMES = ("simmim_swin", "simmim_pvt", "simmim_vit")


@pytest.mark.parametrize("name", NAMES)
def test_masked_pixels_never_reach_the_encoder(name):
    model = build(name)
    images, mask = random_case(model)
    gradient = pixel_gradient(model, images, mask)
    assert (np.asarray(mask.masked_units(gradient)) == 0).all()
    assert (np.asarray(mask.compact(gradient)) != 0).mean() > 0.99


def test_a_uniform_mask_works_too():
    model = build("simmim_vit")
    images = random_images(model)
    mask = sample_uniform_mask(jax.random.key(0), 2, model.cells, 0.0)
    gradient = pixel_gradient(model, images, mask)
    assert (np.asarray(mask.masked_units(gradient)) == 0).all()
    assert (np.asarray(mask.compact(gradient)) != 0).mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_depends_only_on_masked_units(name):
    model = build(name)
    images, mask = random_case(model)
    gradient = jax.grad(lambda images: jnp.sum(jnp.square(model.target(images, mask))))(images)
    assert (np.asarray(mask.compact(gradient)) == 0).all()
    np.testing.assert_allclose(mask.masked_units(gradient - 2 * images), 0, atol=1e-5)
    loss, prediction = run(model, images, mask)
    assert float(loss) == pytest.approx(np.abs(prediction - model.target(images, mask)).mean(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_is_predicted_from_the_token_that_covers_it(name):
    """Channel c * r * r + i * r + j of a token goes to place (i, j) of its units."""
    model = build(name)
    images, mask = random_case(model)
    latent = encode(model, images, mask)
    raw, predicted = np.asarray(model.decoder_prediction(latent)), np.asarray(model.predict(latent))
    r = model.decoder_factor
    assert predicted.shape == (2, 2 * model.cells[0], 2 * model.cells[1], model.unit**2 * 3)
    places = mask.masked_units(jnp.arange(predicted[0, ..., 0].size).reshape(1, *predicted.shape[1:3], 1))
    masked = np.take_along_axis(predicted.reshape(2, -1, predicted.shape[-1]), np.asarray(places).reshape(2, -1, 1), 1)
    np.testing.assert_allclose(run(model, images, mask)[1].reshape(masked.shape), masked, atol=1e-5)
    for row, column in np.ndindex(predicted.shape[1:3]):
        token = raw[:, row // r, column // r]
        np.testing.assert_allclose(predicted[:, row, column], token[:, (row % r) * r + column % r :: r * r], atol=1e-5)
