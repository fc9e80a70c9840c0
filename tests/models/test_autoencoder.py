"""Properties of the masked autoencoder around every encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import build, encode, pixel_gradient, random_case, run
from umae_jax.masking import UniformMask, expand
from umae_jax.models.encoder import Features
from umae_jax.positions import sincos_table
from umae_jax.random_masking import RandomMask, sample_random_mask

PYRAMIDS = ("swin_um_window8", "pvt_um")
NAMES = (*PYRAMIDS, "vit_um", "vit_random")


def features_of_zeros(model, batch):
    """An encoder's output that leaves only positions in the decoder's tokens."""
    grid = [cells // model.decoder_factor for cells in model.cells]
    class_token = jnp.zeros((batch, 1, model.encoder.widths[-1])) if model.encoder.stride == model.unit else None
    return Features((jnp.zeros((batch, *grid, model.encoder.widths[-1])),), class_token)


def unit_grid(model):
    return 2 * model.cells[0], 2 * model.cells[1]


@pytest.mark.parametrize("name", NAMES)
def test_unsampled_and_hidden_pixels_never_reach_the_encoder(name):
    window = {"window": 8} if name == "swin_um_window8" else {}
    model = build(name, secondary_ratio=0.25, **window)
    images, mask = random_case(model)
    gradient = pixel_gradient(model, images, mask)
    sampled, hidden = np.asarray(mask.compact(gradient)), np.asarray(expand(mask.hidden, model.unit))
    assert hidden.mean() == 0.25
    assert (np.asarray(mask.masked_units(gradient)) == 0).all()
    assert (sampled[hidden] == 0).all()
    assert (sampled[~hidden] != 0).mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_depends_only_on_unsampled_units(name):
    model, plain = build(name), build(name, norm_pix_loss=False)
    images, mask = random_case(model)
    gradient = jax.grad(lambda images: jnp.sum(jnp.square(plain.target(images, mask))))(images)
    assert (np.asarray(mask.compact(gradient)) == 0).all()
    np.testing.assert_allclose(mask.masked_units(gradient - 2 * images), 0, atol=1e-5)
    loss, prediction = run(model, images, mask)
    assert float(loss) == pytest.approx(np.square(prediction - model.target(images, mask)).mean(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_normalised_target_has_mean_0_and_unbiased_variance_1(name):
    model = build(name)
    images, mask = random_case(model)
    target = np.asarray(model.target(5 + 3 * images, mask))
    np.testing.assert_allclose(target.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(target.var(-1, ddof=1), 1, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_decoder_token_carries_the_position_of_its_own_unit(name):
    """The sampled units come first, then the others, both in the order of the mask's maps."""
    model = build(name)
    _, mask = random_case(model)
    tokens = np.array(model.decoder_tokens(features_of_zeros(model, 2), mask))
    grid, width = unit_grid(model), tokens.shape[-1]
    count = grid[0] * grid[1]
    leading, tokens = tokens[:, :-count], tokens[:, -count:]
    assert leading.shape[1] == name.startswith("vit")
    assert (leading == 0).all()
    tokens[:, count // 4 :] -= np.asarray(model.decoder_mask_token[...])
    table = sincos_table(width, grid).reshape(-1, width)
    places = np.abs(tokens[:, :, None] - table).max(-1).argmin(-1)
    numbers = jnp.arange(count, dtype=jnp.int32).reshape(1, *grid, 1)
    np.testing.assert_array_equal(places[:, : count // 4], mask.compact(numbers).reshape(2, -1))
    np.testing.assert_array_equal(places[:, count // 4 :], mask.masked_units(numbers).reshape(2, -1))
    assert (np.sort(places) == np.arange(count)).all()
    np.testing.assert_allclose(tokens, table[places], atol=1e-6)


@pytest.mark.parametrize("name", ["vit_um", "vit_random"])
def test_the_class_token_is_the_decoder_s_first_and_has_no_position(name):
    model = build(name)
    _, mask = random_case(model)
    class_token = jax.random.normal(jax.random.key(3), (2, 1, 32))
    tokens = model.decoder_tokens(features_of_zeros(model, 2)._replace(class_token=class_token), mask)
    np.testing.assert_allclose(tokens[:, :1], model.decoder_embed(class_token), atol=1e-6)


@pytest.mark.parametrize("reference_order", [False, True])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_sampling_another_unit_moves_only_its_own_position(name, reference_order):
    """In the reference's order it moves the positions of other tokens too."""
    model = build(name, reference_order=reference_order)
    count = model.cells[0] * model.cells[1]
    before = jnp.zeros((1, *model.cells), jnp.int32).at[0, 0, 1].set(2)
    masks = [UniformMask(offset, offset > 3) for offset in (before, before.at[0, 0, 0].set(2))]
    tokens, moved = (np.asarray(model.decoder_tokens(features_of_zeros(model, 1), mask))[0, :count] for mask in masks)
    changed = np.flatnonzero((tokens != moved).any(-1))
    assert (list(changed) == [0]) == (not reference_order)


@pytest.mark.parametrize("name", NAMES)
def test_decode_is_the_decoder_run_on_all_tokens(name):
    model = build(name)
    images, mask = random_case(model)

    @jax.jit
    def decode_all(model, features):
        tokens = model.decoder_tokens(features, mask)
        for block in model.decoder_blocks:
            tokens = block(tokens)
        return model.decoder_prediction(model.decoder_norm(tokens))

    features = encode(model, images, mask)
    prediction = np.asarray(jax.jit(lambda model, features: model.decode(features, mask))(model, features))
    count = model.cells[0] * model.cells[1]
    expected = np.asarray(decode_all(model, features))[:, -3 * count :].reshape(prediction.shape)
    np.testing.assert_allclose(prediction, expected, atol=1e-5)


def test_the_order_of_a_random_mask_s_units_does_not_change_the_loss():
    model = build("vit_random", secondary_ratio=0.25)
    images, mask = random_case(model)
    count = model.cells[0] * model.cells[1]
    sampled, others = (np.random.default_rng(0).permutation(size) for size in (count, 3 * count))
    order = np.asarray(mask.order).reshape(2, -1)
    order = np.concatenate([order[:, :count][:, sampled], order[:, count:][:, others]], 1).reshape(mask.order.shape)
    hidden = np.asarray(mask.hidden).reshape(2, -1)[:, sampled].reshape(mask.hidden.shape)
    shuffled = RandomMask(jnp.asarray(order), jnp.asarray(hidden))
    whole = []
    for each in (mask, shuffled):
        loss, prediction = run(model, images, each)
        pixels = each.assemble(jnp.zeros((2, *model.cells, prediction.shape[-1])), prediction)
        whole.append((float(loss), np.asarray(pixels)))
    assert whole[0][0] == pytest.approx(whole[1][0], rel=1e-5)
    np.testing.assert_allclose(whole[0][1], whole[1][1], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_secondary_masking_there_is_no_mask_token_in_the_encoder(name):
    model = build(name, secondary_ratio=0.0)
    _, mask = random_case(model)
    assert model.mask_token is None
    assert not mask.hidden.any()


@pytest.mark.parametrize("name", ["swin_um_window8", "pvt_um"])
def test_a_pyramid_raises_for_a_random_mask(name):
    model = build(name)
    images, _ = random_case(model)
    mask = sample_random_mask(jax.random.key(0), 2, model.cells, 0.25)
    with pytest.raises(TypeError, match="RandomMask"):
        model.encode(images, mask)
