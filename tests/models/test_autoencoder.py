"""Properties of the masked autoencoder around every encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import build, encode, pixel_gradient, random_case, run
from umae_jax.errors import UserError
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
    model = build(name, window=8, secondary_ratio=0.25)
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


@pytest.mark.parametrize("name", NAMES)
def test_without_secondary_masking_there_is_no_mask_token_in_the_encoder(name):
    model = build(name, secondary_ratio=0.0)
    _, mask = random_case(model)
    assert model.mask_token is None
    assert not mask.hidden.any()


TWO_STAGES = {"patch": 2, "widths": (16, 32), "depths": (2, 2), "heads": (2, 4), "mlp_ratios": (4, 2)}
THREE_STAGES = {"widths": (8, 16, 24), "depths": (1, 2, 1), "heads": (1, 2, 4), "mlp_ratios": (2, 4, 4)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swin_um_window8", {"image_size": (64, 256)}),
        ("swin_um_window8", {"image_size": (192, 192), "window": 12}),
        ("swin_um_window8", {"channels": 5, "image_size": (64, 64)}),
        ("swin_um_window8", {**TWO_STAGES, "image_size": (32, 64)}),
        ("swin_um_window8", {**THREE_STAGES, "decoder_factor": 1, "image_size": (64, 64), "window": 8}),
        ("swin_um_window8", {"decoder_factor": 4, "image_size": (64, 64)}),
        ("pvt_um", {"image_size": (64, 256)}),
        ("pvt_um", {"image_size": (192, 192), "channels": 1, "sr_ratios": (6, 2, 2, 1)}),
        ("pvt_um", {**TWO_STAGES, "sr_ratios": (4, 1), "image_size": (32, 64)}),
        ("pvt_um", {**THREE_STAGES, "sr_ratios": (1, 1, 1), "decoder_factor": 4, "image_size": (32, 64)}),
        ("vit_um", {"image_size": (32, 80), "channels": 1}),
        ("vit_um", {"patch": 4, "image_size": (24, 8), "secondary_ratio": 0.5}),
        ("vit_random", {"image_size": (32, 80), "channels": 1}),
        ("vit_random", {"patch": 4, "image_size": (24, 8), "secondary_ratio": 0.5}),
    ],
)
def test_other_shapes_compute(name, changes):
    model = build(name, **changes)
    loss, prediction = run(model, *random_case(model))
    assert np.isfinite(float(loss))
    assert prediction.shape == (2, 3, *model.cells, model.unit**2 * model.encoder.channels)
    assert tuple(2 * cells * model.unit for cells in model.cells) == changes["image_size"]


@pytest.mark.parametrize("name", ["swin_um_window8", "pvt_um"])
def test_a_pyramid_raises_for_a_random_mask(name):
    model = build(name)
    images, _ = random_case(model)
    mask = sample_random_mask(jax.random.key(0), 2, model.cells, 0.25)
    with pytest.raises(TypeError, match="RandomMask"):
        model.encode(images, mask)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("swin_um_window8", {"method": "mae"}, "model.method.*swin"),
        ("pvt_um", {"method": "mae"}, "model.method.*pvt"),
        ("vit_um", {"reference_order": True}, "model.reference_order"),
        ("vit_random", {"reference_order": True}, "model.reference_order"),
        ("swin_um_window8", {"image_size": (100, 128)}, "image_size.* 100 .*64.*64 or 128$"),
        ("pvt_um", {"image_size": (128, 40)}, "image_size.* 40 .*64.*64$"),
        ("vit_random", {"image_size": (64, 40)}, "image_size.* 40 .*16.*32 or 48$"),
        ("vit_um", {"image_size": (64, 37)}, "image_size.* 37 .*8.*32 or 40$"),
        ("swin_um_window8", {"heads": (1, 3, 4, 8)}, "model.heads.* 3 .* 32 .*stage 2"),
        ("pvt_um", {"heads": (1, 2, 4)}, "model.heads.* 3 .* 4"),
        ("swin_um_window8", {"mlp_ratios": (4,)}, "model.mlp_ratios.* 1 .* 4"),
        ("vit_um", {"widths": (32, 64)}, "model.widths.* 2 .* 1"),
        ("pvt_um", {"depths": (1, 2, 0, 1)}, r"model.depths.*\(1, 2, 0, 1\)"),
        ("pvt_um", {"sr_ratios": (8, 4, 2)}, "model.sr_ratios.* 3 .* 4"),
        (
            "pvt_um",
            {"sr_ratios": (12, 4, 2, 1)},
            r"model.sr_ratios.* 6 .*16 x 16.*\(8, 4, 2, 1\)$",
        ),
        ("pvt_um", {"widths": (18, 24, 40, 48)}, "model.widths.* 18 .*4"),
        (
            "vit_um",
            {"widths": (32, 32), "depths": (1, 1), "heads": (4, 4), "mlp_ratios": (4, 4)},
            r"model.depths.*\(1, 1\)",
        ),
        ("swin_um_window8", {"secondary_ratio": 1.0}, "model.secondary_ratio"),
        ("vit_random", {"secondary_ratio": -0.5}, "model.secondary_ratio"),
        ("swin_um_window8", {"secondary_ratio": 0.99}, "model.secondary_ratio.* 0.99 .*16"),
        ("pvt_um", {"decoder_factor": 3}, "model.decoder_factor.* 3 .* 8"),
        ("vit_um", {"decoder_factor": 2}, "model.decoder_factor.* 2 .* 1"),
        ("vit_um", {"decoder_width": 30}, "model.decoder_width.* 30 .*28 or 32$"),
        ("pvt_um", {"decoder_heads": 5}, "model.decoder_heads.* 5 .*32"),
        ("vit_um", {"decoder_depth": 0}, "model.decoder_depth.* 0"),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error_naming_the_key(name, changes, message):
    with pytest.raises(UserError, match=message):
        build(name, **changes)
