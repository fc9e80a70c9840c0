"""SimMIM: the encoder sees the whole image except masked units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import build, encode, pixel_gradient, random_case, random_images, run
from umae_jax.errors import UserError
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


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_follows_float32(name):
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = build(name, dtype=dtype)
        loss, prediction = run(model, *random_case(model))
        assert loss.dtype == prediction.dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("simmim_swin", {"image_size": (96, 160), "channels": 1}),  # grids that windows do not tile
        ("simmim_swin", {"image_size": (64, 64), "decoder_factor": 1}),
        ("simmim_pvt", {"image_size": (96, 32), "sr_ratios": (4, 2, 1, 1), "decoder_factor": 4, "channels": 5}),
        ("simmim_vit", {"image_size": (48, 80)}),
    ],
)
def test_other_shapes_compute(name, changes):
    model = build(name, **changes)
    loss, prediction = run(model, *random_case(model))
    assert np.isfinite(float(loss))
    assert prediction.shape == (2, 3, *model.cells, model.unit**2 * model.encoder.channels)
    assert tuple(2 * cells * model.unit for cells in model.cells) == changes["image_size"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("simmim_swin", {"image_size": (100, 128)}, "image_size.* 100 .*32.*96 or 128$"),
        ("simmim_swin", {"image_size": (64, 96), "decoder_factor": 1}, "image_size.* 96 .*64.*64 or 128$"),
        ("simmim_vit", {"image_size": (64, 40)}, "image_size.* 40 .*16.*32 or 48$"),
        (
            "simmim_pvt",
            {"image_size": (128, 96), "sr_ratios": (16, 4, 2, 1)},
            r"model.sr_ratios.* 16 .*32 x 24.*\(8, 4, 2, 1\)$",
        ),
        ("simmim_swin", {"decoder_factor": 3}, "model.decoder_factor.* 3 .* 8"),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error_naming_the_key(name, changes, message):
    with pytest.raises(UserError, match=message):
        build(name, **changes)
