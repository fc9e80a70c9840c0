"""Pyramids for dense prediction: parity with the reference, any canvas, padding, and their parameters."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.rngs import ConstantRngs
from umae_jax.config import default_config
from umae_jax.errors import UserError
from umae_jax.models import attention
from umae_jax.models.build import build_encoder, build_model, build_pyramid
from umae_jax.models.layers import TransformerBlock
from umae_jax.models.positions_table import interpolate_positions
from umae_jax.models.pyramid import STRIDES
from umae_jax.models.windows import make_dense_windows, make_windows
from umae_jax.weights.names import LEAVES, SAME, TRANSPOSED, reference_entry

FOLDER = Path(__file__).parents[1] / "golden_numbers" / "detection"
SIZES = {
    "swin": {
        "widths": (4, 8, 16, 32),
        "depths": (2, 2, 2, 2),
        "heads": (1, 2, 2, 4),
        "position_width": 6,
        "window": 4,
    },
    "pvt": {"widths": (4, 6, 8, 12), "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 3), "mlp_ratios": (4, 3, 2, 2)},
    "vit": {"widths": (16,), "depths": (2,), "heads": (2,)},
}
PRESETS = {"swin": "swin_tiny", "pvt": "pvt_small", "vit": "vit_base"}
NAMES = tuple(SIZES)


def config_of(encoder, image_size=(96, 96), **changes):
    config = default_config(PRESETS[encoder], "classifier")
    config.dtype, config.image_size = "float32", image_size
    with config.unlocked():
        for key, value in {**SIZES[encoder], **changes}.items():
            setattr(config if key in config else config.model, key, value)
    return config


@functools.cache
def build(encoder, image_size=(96, 96), **changes):
    config = config_of(encoder, image_size, **changes)
    return build_pyramid(config, jnp.dtype(config.dtype), nnx.Rngs(0))


@jax.jit
def run(pyramid, images, image_size=None, drop_keys=None):
    return pyramid(images, image_size, drop_keys)


def random_images(size, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, *size, 3))


def parameters_of(model):
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def reference_of(config, name):
    """Return the reference's name and layout of a parameter of a pyramid."""
    module, _, leaf = name.rpartition(".")
    module, _, number = module.partition(".")
    if module not in ("norms", "projections"):
        return reference_entry(config, name)
    place = ("norms", "projections").index(module)
    return f"up{int(number) + 1}.{place}.{LEAVES[leaf]}", TRANSPOSED if leaf == "kernel" else SAME


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


class Errors(NamedTuple):
    """Largest differences from a golden file: absolute of maps, relative to each array's maximum of gradients."""

    maps: float
    gradient: float
    image_gradient: float


def errors(config, numbers, prefix=""):
    """Compute the maps and gradients of a golden file, at the image size that the prefix names, and compare."""
    parameters = {key.removeprefix("p/"): value for key, value in numbers.items() if key.startswith("p/")}
    pyramid = nnx.eval_shape(lambda: build_pyramid(config, jnp.float32, ConstantRngs()))
    graph, params = nnx.split(pyramid, nnx.Param)[:2]
    entries = {path: reference_of(config, ".".join(map(str, path))) for path, _ in nnx.to_flat_state(params)}
    assert {theirs for theirs, _ in entries.values()} == set(parameters)
    params = nnx.from_flat_state(
        (path, nnx.Param(jnp.asarray(layout.to_ours(parameters[theirs])))) for path, (theirs, layout) in entries.items()
    )
    expected = tuple(nhwc(numbers[f"{prefix}out{stage}"]) for stage in range(4))
    with_gradients = f"{prefix}gx" in numbers
    cotangents = tuple(nhwc(numbers[f"{prefix}ct{stage}"]) for stage in range(4)) if with_gradients else expected

    @jax.jit
    def compute(params, images):
        maps, pull = jax.vjp(lambda params, images: nnx.merge(graph, params)(images), params, images)
        return maps, pull(cotangents)

    maps, (gradients, image_gradient) = compute(params, nhwc(numbers[f"{prefix}x"]))
    map_error = max(float(jnp.abs(ours - theirs).max()) for ours, theirs in zip(maps, expected, strict=True))
    if not with_gradients:
        return Errors(map_error, 0.0, 0.0)
    gradient_errors = []
    for path, variable in nnx.to_flat_state(gradients):
        theirs, layout = entries[path]
        wanted = numbers[f"{prefix}g/{theirs}"]
        # This bias shifts whole softmax rows, so its true gradient is 0: compare on the scale of the MLP's.
        scale = numbers[f"{prefix}g/{theirs.replace('posmlp.2.bias', 'posmlp.2.weight')}"]
        gradient_errors.append(np.abs(layout.to_theirs(np.asarray(variable[...])) - wanted).max() / np.abs(scale).max())
    wanted = nhwc(numbers[f"{prefix}gx"])
    return Errors(
        map_error, float(max(gradient_errors)), float(jnp.abs(image_gradient - wanted).max() / jnp.abs(wanted).max())
    )


def check_errors(found):
    print(found)
    assert found.maps < 1e-4
    assert found.gradient < 1e-3
    assert found.image_gradient < 1e-3


def test_swin_equals_the_reference_for_detection():
    """Windows of 4 tile neither 6 x 4 nor 3 x 2 tokens; the last stage's are of 3, without shift."""
    check_errors(errors(config_of("swin", output_width=12), dict(np.load(FOLDER / "swin_umdet.npz"))))


@pytest.mark.parametrize("size", ["64x64", "64x96", "80x112"])
def test_pvt_equals_the_reference_for_detection(size):
    """At 80 x 112 pixels, neither pooling nor merges divide the maps."""
    config = config_of("pvt", (64, 64), output_width=6)
    check_errors(errors(config, dict(np.load(FOLDER / "pvt_umdet.npz")), f"s{size}/"))


@pytest.mark.parametrize("grid", [(16, 16), (16, 24), (20, 28)])
def test_position_tables_are_resized_as_in_the_reference(grid):
    numbers = np.load(FOLDER / "pvt_umdet.npz")
    table = jnp.asarray(numbers["p/pos_embed"].reshape(1, 16, 16, 4))
    expected = numbers[f"s{4 * grid[0]}x{4 * grid[1]}/pos_embed"].reshape(1, *grid, 4)
    np.testing.assert_allclose(interpolate_positions(table, grid), expected, atol=1e-5)


def plain_maps(encoder, image_size):
    """Return a pyramid, and the maps of the encoder as pre-training and classification use it, normed."""
    pyramid = build(encoder, image_size)
    config = config_of(encoder, image_size)
    plain = build_encoder(config, jnp.float32, nnx.Rngs(0), final_norm=False)
    nnx.update(plain, nnx.state(pyramid.encoder))
    if encoder == "swin":  # outside blocks, the reference's epsilon is another in dense prediction
        plain.set_attributes(nnx.LayerNorm, epsilon=1e-5)

    @jax.jit
    def maps(plain, norms, images):
        maps = plain(plain.embed(images)).maps
        return [norm(x) for norm, x in zip(norms, maps, strict=True)]

    norms = pyramid.norms if encoder != "vit" else pyramid.norms[2:3]
    return pyramid, lambda images: maps(plain, norms, images)


@pytest.mark.parametrize("encoder", NAMES)
def test_maps_are_the_normed_maps_of_the_encoder_where_windows_tile_them(encoder):
    pyramid, plain = plain_maps(encoder, (128, 128))
    images = random_images((128, 128))
    maps = run(pyramid, images)
    for ours, theirs in zip(maps[2:3] if encoder == "vit" else maps, plain(images), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def regions_by_slices(size, window, shift):
    """Return the regions of an axis that Swin's three slices give, for tokens in rolled order."""
    regions = np.zeros(size, int)
    for number, part in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
        regions[part] = number
    return regions


@pytest.mark.parametrize(("grid", "window"), [((8, 8), 4), ((6, 10), 4), ((3, 10), 4), ((2, 3), 4), ((7, 15), 7)])
def test_shifted_dense_windows_have_the_regions_of_the_padded_map(grid, window):
    """Rows and columns are shifted, even where a map is no larger than a window."""
    windows = make_dense_windows(grid, window, shifted=True)
    padded = [-(-size // window) * window for size in grid]
    rows, columns = (regions_by_slices(size, window, window // 2) for size in padded)
    region = jnp.asarray(10 * rows[:, None] + columns[None])[None, :, :, None]
    unshifted = make_dense_windows((padded[0], padded[1]), window, shifted=False)
    assert unshifted.mask is None
    region = np.asarray(unshifted.partition(region))[0, :, :, 0]
    np.testing.assert_array_equal(windows.mask == 0, region[:, :, None] == region[:, None, :])


@pytest.mark.parametrize("shifted", [False, True])
def test_tokens_attend_to_the_padding_of_dense_windows(shifted):
    """The padding is like tokens of 0, whose keys and values are the biases."""
    qkv, proj = (nnx.Linear(8, features, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0)) for features in (24, 8))
    x = jax.random.normal(jax.random.key(0), (1, 6, 7, 8))
    padded = jnp.pad(x, ((0, 0), (0, 2), (0, 1), (0, 0)))

    def attend(x, make, **arguments):
        tables = jnp.zeros((1, 1, 2, 16, 16))
        windows = make(x.shape[1:3], 4, shifted=shifted, **arguments)
        return attention.window_attention(qkv, proj, x, windows, tables, 2)[:, :6, :7]

    dense = attend(x, make_dense_windows)
    np.testing.assert_allclose(dense, attend(padded, make_windows, offset=None), atol=1e-5)
    assert np.abs(dense - attend(x, make_windows, offset=None)).max() > 1e-2


@pytest.mark.parametrize("image_size", [(96, 160), (64, 96), (224, 160)])
@pytest.mark.parametrize("encoder", NAMES)
def test_any_canvas_gives_maps_of_four_strides(encoder, image_size):
    pyramid = build(encoder, (224, 224), drop_path=0.2, global_block=True)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, *image_size, 3), np.uint8))
    sizes = jnp.array([image_size, (50, 70)], jnp.int32)
    maps = run(pyramid, images, sizes, jax.random.split(jax.random.key(0), 2))
    expected = [
        (2, image_size[0] // stride, image_size[1] // stride, width)
        for stride, width in zip(STRIDES, pyramid.widths, strict=True)
    ]
    assert [x.shape for x in maps] == expected
    assert all(np.isfinite(x).all() for x in maps)
    dropped = run(pyramid, images, sizes)
    assert np.abs(maps[-1] - dropped[-1]).max() > 1e-3


def test_widths():
    assert build("swin").widths == (4, 8, 16, 32)
    assert build("pvt").widths == (4, 6, 8, 12)
    assert build("vit").widths == (4, 8, 16, 16)
    assert build("vit", output_width=6).widths == (6, 6, 6, 6)


def test_maps_have_the_dtype_of_the_encoder():
    maps = run(build("swin", dtype="bfloat16", global_block=True), random_images((64, 64)))
    exact = run(build("swin", global_block=True), random_images((64, 64)))
    for ours, theirs in zip(maps, exact, strict=True):
        assert (ours.dtype, theirs.dtype) == (jnp.bfloat16, jnp.float32)
        assert np.linalg.norm(ours.astype(jnp.float32) - theirs) < 5e-2 * np.linalg.norm(theirs)


@pytest.mark.parametrize("encoder", NAMES)
def test_pixels_beyond_the_content_have_no_gradient(encoder):
    pyramid = build(encoder, global_block=True)
    sizes = jnp.array([(50, 96), (96, 33)], jnp.int32)

    @jax.jit
    def gradient(images):
        def project(images):
            maps = pyramid(images, sizes)
            return sum(jnp.sum(jax.random.normal(jax.random.key(9), x.shape) * x) for x in maps)

        return jax.grad(project)(images)

    reached = np.asarray(gradient(random_images((96, 96))) != 0).any(-1)
    rows, columns = np.arange(96)[:, None], np.arange(96)[None]
    for image, (height, width) in enumerate(np.asarray(sizes)):
        inside = (rows < height) & (columns < width)
        assert not reached[image][~inside].any()
        assert reached[image][inside].mean() > 0.9


def test_the_padding_is_zero_after_normalisation():
    pyramid = build("swin")
    images = np.random.default_rng(0).integers(0, 256, (1, 96, 64, 3), np.uint8)
    padded = np.array(pyramid.encoder.normalize(jnp.asarray(images)))
    padded[:, 40:], padded[:, :, 30:] = 0, 0
    ours = run(pyramid, jnp.asarray(images), jnp.array([(40, 30)], jnp.int32))
    for one, other in zip(ours, run(pyramid, jnp.asarray(padded)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_padding_does_not_enlarge_the_first_gradients():
    graph, params = nnx.split(build("swin"))

    @jax.jit
    def norm_of_gradient(image_sizes):
        def loss(params):
            maps = nnx.merge(graph, params)(random_images((96, 96), 1), image_sizes)
            weights = (jax.random.normal(jax.random.key(number), x.shape) for number, x in enumerate(maps))
            return sum((x * weight).sum() for x, weight in zip(maps, weights, strict=True))

        return optax.tree.norm(jax.grad(loss)(params))

    assert norm_of_gradient(jnp.array([(40, 48)])) < 10 * norm_of_gradient(jnp.array([(96, 96)]))


@pytest.mark.parametrize("encoder", NAMES)
def test_the_global_block_transforms_the_last_map_before_its_norm(encoder):
    pyramid = build(encoder, global_block=True)
    without = nnx.clone(pyramid)
    without.global_block = None
    before_norm = nnx.clone(without)
    before_norm.norms = nnx.List([*without.norms[:3], lambda x: x])
    images = random_images((96, 64))
    maps, plain, last = run(pyramid, images), run(without, images), run(before_norm, images)[-1]
    for ours, theirs in zip(maps[:3], plain[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    block = nnx.clone(pyramid.global_block)
    expected = pyramid.norms[-1](block(last.reshape(2, 6, -1))).reshape(last.shape)
    np.testing.assert_allclose(maps[-1], expected, atol=1e-5)
    assert np.abs(maps[-1] - plain[-1]).max() > 1e-2


@pytest.mark.parametrize("encoder", NAMES)
def test_the_global_block_has_12_d_squared_parameters(encoder):
    """Four products of width d in attention, eight in the MLP; 9 d biases, and two norms."""
    pyramid = build(encoder, global_block=True)
    width = pyramid.widths[-1]
    count = sum(array.size for array in jax.tree.leaves(nnx.state(pyramid.global_block, nnx.Param)))
    assert count == 12 * width**2 + 9 * width + 2 * 2 * width
    assert isinstance(pyramid.global_block, TransformerBlock)
    assert pyramid.global_block.heads == pyramid.encoder.heads[-1]


def loss_and_parameters(encoder, policy):
    depths = (3,) if encoder == "vit" else (1, 3, 1, 1)
    pyramid = build(encoder, (64, 64), depths=depths, rematerialize=policy, global_block=True)
    graph, params = nnx.split(pyramid, nnx.Param)[:2]
    images = random_images((64, 64))
    return lambda params: sum(jnp.mean(jnp.sin(3 * x)) for x in nnx.merge(graph, params)(images)), params


@pytest.mark.parametrize("encoder", NAMES)
def test_rematerialized_stages_save_no_inputs_of_blocks(encoder):
    saved = []
    for policy in ("blocks", "stages"):
        loss, params = loss_and_parameters(encoder, policy)
        backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        saved.append(sum(array.size for array in jax.tree.leaves(backward)))
    # The stage of three blocks has inputs of two images of 8 x 8 tokens, or of 4 x 4 and a class token.
    block_input = {"swin": 2 * 8 * 8 * 8, "pvt": 2 * 8 * 8 * 6, "vit": 2 * 17 * 16}[encoder]
    assert saved[0] - saved[1] > 0.9 * 2 * block_input


@pytest.mark.parametrize("encoder", NAMES)
def test_rematerialized_stages_change_no_gradient(encoder):
    gradients = []
    for policy in ("none", "stages"):
        loss, params = loss_and_parameters(encoder, policy)
        gradients.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *gradients)


@pytest.mark.parametrize("encoder", NAMES)
def test_the_encoder_has_the_parameters_of_a_classifier_s(encoder):
    config = config_of(encoder)
    classifier = parameters_of(nnx.eval_shape(lambda: build_model(config, ConstantRngs())))
    pyramid = parameters_of(build(encoder, global_block=True, output_width=6))
    shapes = [
        {name: value.shape for name, value in parameters.items() if name.startswith("encoder.")}
        for parameters in (classifier, pyramid)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("encoder", NAMES)
def test_layers_are_those_of_a_classifier_and_the_last_for_all_else(encoder):
    config = config_of(encoder)
    classifier = nnx.eval_shape(lambda: build_model(config, ConstantRngs()))
    pyramid = build(encoder, global_block=True, output_width=6)
    assert pyramid.num_layers == classifier.num_layers == sum(pyramid.encoder.depths) + 1
    names = parameters_of(pyramid)
    for name in names:
        expected = classifier.layer_index(name) if name.startswith("encoder.") else pyramid.num_layers
        assert pyramid.layer_index(name) == expected
    assert {name.partition(".")[0] for name in names} - {"simple"} == {
        "encoder",
        "global_block",
        "norms",
        "projections",
    }
    for name in ("head.kernel", "encoder.norm.scale", "rpn.kernel"):
        with pytest.raises(ValueError, match=name):
            pyramid.layer_index(name)


THREE_STAGES = {"widths": (4, 8, 16), "depths": (1, 1, 1), "heads": (1, 2, 2), "mlp_ratios": (4, 4, 4)}


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        ("vit", {"patch": 8}, r"model\.patch.* 16 .* 8"),
        ("swin", {"patch": 8, "image_size": (128, 128)}, r"model\.patch.* 4 .* 8"),
        ("swin", THREE_STAGES, r"model\.depths.* 3"),
        ("swin", {"image_size": (96, 100)}, r"image_size.* 100 .*32.*96 or 128"),
        ("pvt", {"sr_ratios": (8, 4, 2)}, r"model\.sr_ratios.* 3 .* 4"),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error_naming_the_key(encoder, changes, message):
    with pytest.raises(UserError, match=message):
        build(encoder, **changes)


def test_pooling_a_map_that_is_too_small_raises_an_error():
    with pytest.raises(UserError, match=r"model\.sr_ratios.* 16 .*8 x 8"):
        run(build("pvt", sr_ratios=(16, 4, 2, 1)), random_images((32, 32)))
