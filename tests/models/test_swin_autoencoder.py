"""The Swin autoencoder: the reference's numbers, and properties that no example shows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden
from umae_jax import masking
from umae_jax.errors import UserError
from umae_jax.models.autoencoder import MaskedAutoencoder
from umae_jax.models.swin import PositionBias, Swin
from umae_jax.models.windows import ACROSS_BORDERS, make_windows
from umae_jax.positions import sincos_table

DEPTHS = (2, 2, 2, 2)
FILES = {"swin_um_window8": (8, 0.25, True), "swin_um_window4_no_secondary": (4, 0.0, False)}


def build(
    *,
    window=8,
    secondary_ratio=0.25,
    normalize_target=True,
    reference_order=False,
    image_size=(128, 128),
    channels=3,
    patch=4,
    width=16,
    depths=DEPTHS,
    heads=(1, 2, 4, 8),
    decoder_factor=2,
    dtype=jnp.float32,
):
    """The small model of the golden files, or one like it."""
    rngs = nnx.Rngs(0)
    encoder = Swin(
        channels=channels,
        patch=patch,
        width=width,
        depths=depths,
        heads=heads,
        window=window,
        position_width=8,
        dtype=dtype,
        rngs=rngs,
    )
    return MaskedAutoencoder(
        encoder,
        image_size=image_size,
        channels=channels,
        secondary_ratio=secondary_ratio,
        decoder_factor=decoder_factor,
        decoder_width=32,
        decoder_depth=2,
        decoder_heads=4,
        normalize_target=normalize_target,
        reference_order=reference_order,
        dtype=dtype,
        rngs=rngs,
    )


def random_case(model, batch=2, seed=0):
    height, width = (2 * cells * model.unit for cells in model.cells)
    channels = model.decoder_prediction.out_features // model.unit**2
    images = jax.random.normal(jax.random.key(seed), (batch, height, width, channels))
    mask = masking.sample_uniform_mask(jax.random.key(seed + 1), batch, model.cells, model.secondary_ratio)
    return images, mask


@jax.jit
def encode(model, images, mask):
    return model.encode(images, mask)


@jax.jit
def run(model, images, mask):
    return model(images, mask)


class GoldenErrors(NamedTuple):
    """How far we are from a golden file: the loss relatively, outputs by the largest difference, gradients by norm."""

    loss: float
    latent: float
    prediction: float
    gradient: float
    zero_gradient: float  # the largest entry of gradients that are 0 but for rounding


@functools.cache
def golden_errors(name):
    """Compute a golden file's numbers with its parameters."""
    numbers = golden.load(name)
    window, ratio, normalize = FILES[name]
    model = build(window=window, secondary_ratio=ratio, normalize_target=normalize, reference_order=True)
    golden.fill(model, numbers, DEPTHS)
    images, mask = jnp.asarray(numbers["images"]), golden.mask_of(numbers, model.cells)

    latent = encode(model, images, mask)
    # The prediction of all units, the sampled ones too, which the loss never asks for.
    tokens = model.decoder_tokens(latent, mask.offset)
    for block in model.decoder_blocks:
        tokens = block(tokens)
    everywhere = np.asarray(model.decoder_prediction(model.decoder_norm(tokens)))
    count = model.cells[0] * model.cells[1]
    # The reference lists the others in row-major order of the full grid, we by their place in the cell.
    prediction = model.decode(latent, mask.offset)
    whole = masking.assemble(everywhere[:, :count].reshape(2, *model.cells, -1), prediction, mask.offset)
    others = np.asarray(whole).reshape(2, 4 * count, -1)[numbers["mask"]].reshape(2, 3 * count, -1)

    graph, state = nnx.split(model)
    loss, gradients = jax.jit(jax.value_and_grad(lambda state: nnx.merge(graph, state)(images, mask)[0]))(state)
    expected = golden.parameters(gradients, numbers, DEPTHS, "grad")
    gradient, zero_gradient = [], []
    for keys, ours in nnx.to_flat_state(gradients):
        path = ".".join(map(str, keys))
        if path.endswith("position.fc2.bias"):  # shifts whole softmax rows: its true gradient is 0
            zero_gradient.append(np.abs(ours[...]).max())
        else:
            gradient.append(np.linalg.norm(ours[...] - expected[path]) / np.linalg.norm(expected[path]))
    return GoldenErrors(
        loss=float(np.abs(loss - numbers["loss"]) / numbers["loss"]),
        latent=float(np.abs(latent.reshape(numbers["latent"].shape) - numbers["latent"]).max()),
        prediction=float(np.abs(np.concatenate([everywhere[:, :count], others], 1) - numbers["pred"]).max()),
        gradient=float(max(gradient)),
        zero_gradient=float(max(zero_gradient)),
    )


@pytest.mark.parametrize("name", FILES)
def test_golden_outputs(name):
    errors = golden_errors(name)
    assert errors.loss < 1e-5
    assert errors.latent < 1e-4
    assert errors.prediction < 1e-4


@pytest.mark.parametrize("name", FILES)
def test_golden_gradients_of_every_parameter(name):
    errors = golden_errors(name)
    assert errors.gradient < 2e-4
    assert errors.zero_gradient < 1e-6


def test_bfloat16_follows_float32():
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = build(dtype=dtype)
        images, mask = random_case(model)
        loss, prediction = run(model, images, mask)
        assert loss.dtype == prediction.dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_what_was_not_sampled_or_is_hidden_never_reaches_the_encoder():
    model = build(window=4)
    images, mask = random_case(model)
    weights = jax.random.normal(jax.random.key(9), encode(model, images, mask).shape)
    gradient = jax.grad(lambda images: jnp.sum(weights * encode(model, images, mask)))(images)
    sampled = masking.compact(gradient, mask.offset)
    hidden = masking.expand(mask.hidden, model.unit)
    assert (np.asarray(masking.masked_units(gradient, mask.offset)) == 0).all()
    assert (np.asarray(sampled)[np.asarray(hidden)] == 0).all()
    assert (np.asarray(sampled)[~np.asarray(hidden)] != 0).mean() > 0.99


def test_the_loss_looks_only_at_what_was_not_sampled():
    model = build(normalize_target=False)
    images, mask = random_case(model)
    gradient = jax.grad(lambda images: jnp.sum(jnp.square(model.target(images, mask.offset))))(images)
    assert (np.asarray(masking.compact(gradient, mask.offset)) == 0).all()
    np.testing.assert_allclose(masking.masked_units(gradient - 2 * images, mask.offset), 0, atol=1e-5)


@pytest.mark.parametrize("reference_order", [False, True])
def test_a_sampled_unit_takes_its_position_along(reference_order):
    """What one cell sampled moves the position of its own token and of no other: not so in the reference's order."""
    model = build(reference_order=reference_order)
    count = model.cells[0] * model.cells[1]
    latent = jnp.zeros((1, *(cells // model.decoder_factor for cells in model.cells), 128))
    before = jnp.zeros((1, *model.cells), jnp.int32).at[0, 0, 1].set(2)
    after = before.at[0, 0, 0].set(2)
    tokens, moved = (np.asarray(model.decoder_tokens(latent, offset))[0, :count] for offset in (before, after))
    changed = np.flatnonzero((tokens != moved).any(-1))
    assert (list(changed) == [0]) == (not reference_order)


def test_every_decoder_token_carries_the_position_of_its_own_unit():
    """Found by comparing with the table itself, the sampled ones in the order of cells, the others thrice so."""
    model = build()
    _, mask = random_case(model, batch=1)
    latent = jnp.zeros((1, *(cells // model.decoder_factor for cells in model.cells), 128))
    tokens = np.array(model.decoder_tokens(latent, mask.offset))[0]
    count = model.cells[0] * model.cells[1]
    grid = (2 * model.cells[0], 2 * model.cells[1])
    table = sincos_table(32, grid).reshape(-1, 32)
    tokens[count:] -= np.asarray(model.decoder_mask_token[...]).reshape(1, -1)
    places = np.abs(tokens[:, None] - table[None]).max(-1).argmin(-1)
    rows, columns = np.moveaxis(np.asarray(masking.original_coordinates(mask.offset, 1)), -1, 0)
    np.testing.assert_array_equal(places[:count], (rows * grid[1] + columns).reshape(-1))
    assert sorted(places) == list(range(grid[0] * grid[1]))
    np.testing.assert_allclose(tokens, table[places], atol=1e-6)


def direct_bias(position, windows, offset, grid):
    """The MLP over the original coordinates of every pair of tokens of every window of every image."""
    tokens_a_cell = grid[0] / offset.shape[1]
    if tokens_a_cell >= 1:
        coordinates = masking.original_coordinates(offset, int(tokens_a_cell)).astype(jnp.float32)
    else:  # the merge keeps the top-left coordinates of each group, divided by 2
        every = int(1 / tokens_a_cell)
        coordinates = masking.original_coordinates(offset, 1)[:, ::every, ::every].astype(jnp.float32) / every
    cut = windows.cut(coordinates)
    difference = cut[:, :, None, :, :] - cut[:, :, :, None, :]
    scaled = jnp.sign(difference) * jnp.log1p(jnp.abs(difference))
    return position.fc2(jax.nn.relu(position.fc1(scaled))).transpose(0, 1, 4, 2, 3)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("grid", "cells", "window"),
    [
        ((16, 16), (4, 4), 8),  # stage 1: windows of 2 x 2 units
        ((16, 16), (4, 4), 4),  # windows of one unit; shifted ones cut through units
        ((24, 12), (6, 3), 6),  # windows that cut the units at different places
        ((16, 8), (4, 2), 8),  # a window as wide as the grid
        ((8, 8), (4, 4), 4),  # stage 2
        ((4, 4), (4, 4), 8),  # stage 3, one window
        ((4, 8), (8, 16), 2),  # stage 4: a token spans 2 x 2 units
        ((2, 4), (8, 16), 2),  # a stage more: 4 x 4 units
    ],
)
def test_the_nine_cases_are_the_bias_of_every_pair(grid, cells, window, shifted):
    position = PositionBias(3, 8, rngs=nnx.Rngs(0))
    offset = masking.sample_uniform_mask(jax.random.key(2), 3, cells, 0.25).offset
    windows = make_windows(grid, window, shifted=shifted, offset=offset)
    ours, direct = position(windows), direct_bias(position, windows, offset, grid)
    if windows.mask is not None:
        across = np.broadcast_to(windows.mask[None, :, None] != 0, ours.shape)
        assert (np.asarray(ours)[across] < ACROSS_BORDERS / 2).all()
        ours, direct = np.where(across, 0, ours), np.where(across, 0, direct)
    np.testing.assert_allclose(ours, direct, atol=1e-5)


def test_the_bias_on_a_whole_image_is_the_direct_one():
    position = PositionBias(2, 8, rngs=nnx.Rngs(0))
    windows = make_windows((8, 8), 4, shifted=False, offset=None)
    place = jnp.arange(4, dtype=jnp.float32)
    coordinates = jnp.stack(jnp.meshgrid(place, place, indexing="ij"), -1).reshape(-1, 2)
    difference = coordinates[None, :] - coordinates[:, None]
    scaled = jnp.sign(difference) * jnp.log1p(jnp.abs(difference))
    direct = position.fc2(jax.nn.relu(position.fc1(scaled))).transpose(2, 0, 1)
    np.testing.assert_allclose(position(windows)[0, 0], direct, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": (64, 256)},
        {"image_size": (192, 192), "window": 6},
        {"channels": 5, "image_size": (64, 64)},
        {"patch": 2, "depths": (2, 2), "heads": (2, 4), "image_size": (32, 64)},
        {"patch": 4, "depths": (1, 2, 1), "heads": (1, 2, 4), "decoder_factor": 1, "image_size": (64, 64), "window": 4},
        {"decoder_factor": 4, "image_size": (64, 64)},
    ],
)
def test_other_shapes_compute(changes):
    model = build(**changes)
    images, mask = random_case(model)
    loss, prediction = run(model, images, mask)
    assert np.isfinite(float(loss))
    assert prediction.shape[1:4] == (3, *model.cells)


def test_stages_of_a_whole_image():
    encoder = build().encoder
    maps = jax.jit(lambda images: encoder(encoder.embed(images)))(jnp.zeros((1, 64, 128, 3)))
    assert [stage.shape for stage in maps] == [(1, 16, 32, 16), (1, 8, 16, 32), (1, 4, 8, 64), (1, 2, 4, 128)]


def test_parameters_of_swin_tiny():
    def build_tiny():
        rngs = nnx.Rngs(0)
        encoder = Swin(
            channels=3,
            patch=4,
            width=96,
            depths=(2, 2, 6, 2),
            heads=(3, 6, 12, 24),
            window=8,
            position_width=32,
            rngs=rngs,
        )
        return MaskedAutoencoder(
            encoder,
            image_size=(256, 256),
            channels=3,
            secondary_ratio=0.25,
            decoder_factor=2,
            decoder_width=512,
            decoder_depth=2,
            decoder_heads=16,
            normalize_target=True,
            rngs=rngs,
        )

    state = nnx.state(nnx.eval_shape(build_tiny), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 35_774_346


def test_initialisation():
    """The standard deviation of each kind of parameter, SPEC 9."""
    model = build(width=64, heads=(1, 2, 4, 8))
    block, merge = model.encoder.stages[1].blocks[0], model.encoder.stages[1].merge
    expected = {  # of a Xavier uniform: sqrt(2 / (inputs + outputs))
        "patch": (model.encoder.patch_embed.kernel, (2 / (48 + 64)) ** 0.5),
        "qkv": (block.qkv.kernel, (2 / (128 + 384)) ** 0.5),
        "mlp": (block.mlp.fc1.kernel, (2 / (128 + 512)) ** 0.5),
        "merge": (merge.proj.kernel, (2 / (4 * 128)) ** 0.5),
        "position": (block.position.fc2.kernel, (2 / 2) ** 0.5),
        "token": (model.mask_token, 0.02),
    }
    for name, (parameter, deviation) in expected.items():
        tolerance = 5 / (2 * parameter.size) ** 0.5
        assert float(parameter[...].std()) == pytest.approx(deviation, rel=tolerance), name
    for norm in (model.encoder.norm, block.norm1):
        assert (np.asarray(norm.scale[...]) == 1).all()
        assert (np.asarray(norm.bias[...]) == 0).all()
    assert (np.asarray(block.qkv.bias[...]) == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (100, 128)}, "height 100 is not a multiple of 64.*choose 64 or 128"),
        ({"image_size": (128, 40)}, "width 40 is not a multiple of 64.*choose 64$"),
        ({"heads": (1, 3, 4, 8)}, "3 heads do not divide the width 32 of stage 2"),
        ({"heads": (1, 2, 4)}, "4 stages and model.heads 3"),
        ({"window": 5, "image_size": (192, 192)}, "windows of 5 tokens do not tile .* 24 x 24 .*choose 3 or 6$"),
        ({"window": 1}, "at least 2 tokens"),
        ({"secondary_ratio": 1.0}, r"must lie in \[0, 1\)"),
        ({"secondary_ratio": -0.5}, r"must lie in \[0, 1\)"),
        ({"secondary_ratio": 0.99}, "0.99 hides all 16 sampled units"),
        ({"decoder_factor": 3}, "3 does not divide 8"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)
