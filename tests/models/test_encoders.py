"""Properties of all encoders: shapes of their maps, positions, hidden units, normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import build, encode, random_case, run
from tests.small import original_coordinates
from umae_jax.masking import expand, sample_uniform_mask
from umae_jax.models.positions_table import PositionTable
from umae_jax.positions import sincos_table
from umae_jax.random_masking import sample_random_mask

WIDTHS = {"swin_um_window8": (16, 32, 64, 128), "pvt_um": (16, 24, 40, 48), "vit_um": (32,)}
NAMES = tuple(WIDTHS)


@pytest.mark.parametrize("image_size", [(64, 64), (64, 128), (96, 160)])
@pytest.mark.parametrize("name", NAMES)
def test_each_stage_of_a_whole_image_has_half_the_resolution_of_the_one_before(name, image_size):
    changes = {"sr_ratios": (4, 2, 1, 1)} if name == "pvt_um" else {}
    encoder = build(name, **changes).encoder
    features = jax.jit(lambda images: encoder(encoder.embed(images)))(jnp.ones((2, *image_size, 3)))
    sides = [encoder.patch * 2**stage for stage in range(len(WIDTHS[name]))]
    expected = [
        (2, image_size[0] // side, image_size[1] // side, width)
        for side, width in zip(sides, WIDTHS[name], strict=True)
    ]
    assert [stage.shape for stage in features.maps] == expected
    assert encoder.stride == sides[-1]
    assert (None if features.class_token is None else features.class_token.shape) == (
        (2, 1, 32) if name == "vit_um" else None
    )
    assert features.maps[-1].dtype == jnp.float32
    assert all(np.isfinite(stage).all() for stage in features.maps)


@pytest.mark.parametrize("name", [*NAMES, "vit_random"])
def test_maps_of_the_compact_grid_have_half_the_height_and_width(name):
    model = build(name, image_size=(64, 128))
    images, mask = random_case(model)
    features = encode(model, images, mask)
    sides = [2 * model.encoder.patch * 2**stage for stage in range(len(features.maps))]
    assert [stage.shape[1:3] for stage in features.maps] == [(64 // side, 128 // side) for side in sides]


@pytest.mark.parametrize("name", [*NAMES, "vit_random"])
def test_hidden_units_equal_the_mask_token_after_the_patch_norm(name):
    model = build(name, secondary_ratio=0.25)
    images, mask = random_case(model)
    token = jax.random.normal(jax.random.key(4), model.mask_token.shape)
    embed = jax.jit(lambda encoder, *arguments: encoder.embed(*arguments))
    content = np.asarray(embed(model.encoder, mask.compact(images)))
    tokens = np.asarray(embed(model.encoder, mask.compact(images), mask.hidden, token))
    hidden = np.asarray(expand(mask.hidden, model.unit // model.encoder.patch))
    token = np.asarray(token)[0, 0]
    if name.startswith("swin"):  # at initialisation the norm has scale 1 and bias 0
        token = (token - token.mean()) / np.sqrt(token.var() + 1e-6)
    np.testing.assert_allclose(tokens[hidden], np.broadcast_to(token, tokens[hidden].shape), atol=1e-5)
    np.testing.assert_array_equal(tokens[~hidden], content[~hidden])
    assert hidden.mean() == 0.25


def zeros(batch, grid, width):
    return jnp.zeros((batch, *grid, width))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_positions_on_the_grid_of_the_table_equal_the_table(class_token, learned):
    positions = PositionTable(8, (4, 6), class_token=class_token, learned=learned)
    np.testing.assert_array_equal(positions(zeros(2, (4, 6), 8), None), sincos_table(8, (4, 6))[None])
    assert np.asarray(positions.class_token_position()).shape == (1, int(class_token), 8)
    assert (np.asarray(positions.class_token_position()) == 0).all()


@pytest.mark.parametrize("grid", [(8, 12), (2, 3), (4, 9), (7, 5)])
@pytest.mark.parametrize("class_token", [False, True])
def test_positions_on_another_grid_equal_the_resized_table(class_token, grid):
    positions = PositionTable(8, (4, 6), class_token=class_token, learned=True)
    table = jax.random.normal(jax.random.key(0), (1, 4, 6, 8))
    flat = jnp.concatenate([jnp.full((1, int(class_token), 8), 7.0), table.reshape(1, 24, 8)], axis=1)
    positions.table[...] = flat
    expected = jax.image.resize(table, (1, *grid, 8), "bicubic", antialias=True)
    np.testing.assert_allclose(positions(zeros(1, grid, 8), None), expected, atol=1e-6)
    assert (np.asarray(positions.class_token_position()) == 7).all()


@pytest.mark.parametrize("own_grid", [(8, 12), (4, 4)])
def test_compacted_positions_equal_those_at_the_original_coordinates(own_grid):
    """Use a map of 8 x 12 tokens, 2 x 2 per unit, and a table of that grid or one that is resized to it."""
    positions = PositionTable(8, own_grid)
    whole = np.asarray(positions(zeros(1, (8, 12), 8), None))[0]
    uniform = sample_uniform_mask(jax.random.key(0), 3, (2, 3), 0.25)
    rows, columns = np.moveaxis(original_coordinates(uniform.offset, 2), -1, 0)
    np.testing.assert_array_equal(positions(zeros(3, (4, 6), 8), uniform), whole[rows, columns])
    random = sample_random_mask(jax.random.key(0), 3, (2, 3), 0.25)
    compacted = np.asarray(positions(zeros(3, (4, 6), 8), random))
    for image, row, column in np.ndindex(3, 4, 6):
        unit = divmod(int(random.order[image, 0, row // 2, column // 2]), 6)
        expected = whole[2 * unit[0] + row % 2, 2 * unit[1] + column % 2]
        np.testing.assert_array_equal(compacted[image, row, column], expected)


@pytest.mark.parametrize("name", ["pvt_classifier", "vit_classifier"])
def test_another_image_size_gives_the_features_of_a_resized_position_table(name):
    sizes = {"pvt_classifier": ((64, 64), (64, 128)), "vit_classifier": ((32, 32), (48, 24))}[name]
    ours, theirs = (nnx.clone(build(name, image_size=size).encoder) for size in sizes)
    leading = int(name == "vit_classifier")
    grids = [tuple(side // ours.patch for side in size) for size in sizes]
    width = ours.widths[0]
    table = ours.positions.table[...]
    resized = jax.image.resize(table[:, leading:].reshape(1, *grids[0], width), (1, *grids[1], width), "bicubic")
    state = nnx.state(ours)
    resized = jnp.concatenate([table[:, :leading], resized.reshape(1, -1, width)], axis=1)
    state["positions"]["table"] = state["positions"]["table"].replace(resized)
    nnx.update(theirs, state)
    images = jax.random.normal(jax.random.key(1), (2, *sizes[1], 3))
    last_map = jax.jit(lambda encoder: encoder(encoder.embed(images)).maps[-1])
    np.testing.assert_allclose(last_map(ours), last_map(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["pvt_um", "vit_um"])
def test_equal_patches_differ_by_their_positions(name):
    model = build(name)
    encoder = model.encoder
    first = np.asarray(jax.jit(lambda images: encoder(encoder.embed(images)).maps[0])(jnp.ones((1, 64, 64, 3))))
    tokens = first.reshape(-1, first.shape[-1])
    distances = np.abs(tokens[:, None] - tokens[None]).max(-1) + np.eye(len(tokens))
    assert distances.min() > 1e-3


def test_integer_pixels_are_normalised_by_mean_and_std():
    encoder = build("pvt_um").encoder
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(encoder.normalize(jnp.asarray(images)), expected, atol=1e-5)
    patches = encoder.normalize(jnp.asarray(images.reshape(2, 4, 12)))  # four pixels each
    np.testing.assert_allclose(patches, expected.reshape(2, 4, 12), atol=1e-5)


def test_float_images_are_not_normalised_again():
    encoder = build("pvt_um").encoder
    images = jnp.ones((1, 4, 4, 3))
    assert encoder.normalize(images) is images


@pytest.mark.parametrize("name", [*NAMES, "simmim_swin"])
def test_uint8_images_give_the_loss_of_normalised_ones(name):
    model = build(name)
    _, mask = random_case(model)
    size = [2 * cells * model.unit for cells in model.cells]
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, *size, 3)), jnp.uint8)
    losses = [float(run(model, x, mask)[0]) for x in (images, model.encoder.normalize(images))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
