"""Classifiers: pooling, the head, learned positions and drop path."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden
from tests.models.small import build
from tests.rngs import ConstantRngs
from umae_jax.models.build import build_model
from umae_jax.models.layers import DropPath
from umae_jax.positions import sincos_table
from umae_jax.weights.names import reference_entry

NAMES = ("swin_classifier", "pvt_classifier", "vit_classifier")
SMALL = {"image_size": (64, 64)}


def random_images(batch=2, size=(64, 64), channels=3):
    return jax.random.normal(jax.random.key(0), (batch, *size, channels))


@jax.jit
def run(model, images):
    return model(images)


@jax.jit
def encode(model, images, drop_keys=None):
    return model.encoder(model.encoder.embed(images), drop_keys=drop_keys)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_head_of_the_normalised_mean_of_the_patch_tokens(name):
    """The mean excludes a ViT's class token."""
    model = build(name, **SMALL)
    images = random_images()
    logits = run(model, images)
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32
    features = encode(model, images)
    assert (features.class_token is not None) == (name == "vit_classifier")
    mean = np.asarray(features.maps[-1]).mean((1, 2))
    normalised = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    # The head's initial weights are about 1e-5.
    np.testing.assert_allclose(logits * 1e5, normalised @ np.asarray(model.head.kernel[...]) * 1e5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_follows_float32(name):
    logits = []
    for dtype in ("float32", "bfloat16"):
        model = build(name, dtype=dtype, **SMALL)
        logits.append(np.asarray(run(model, random_images())))
        assert logits[-1].dtype == np.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    error = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
    assert 0 < error < 5e-2


def test_the_head_starts_near_zero():
    kernel = np.asarray(build("pvt_classifier", classes=1000, **SMALL).head.kernel[...])
    assert kernel.std() == pytest.approx(2e-5, rel=0.02)
    assert kernel.mean() == pytest.approx(0, abs=5 * 2e-5 / kernel.size**0.5)


@pytest.mark.parametrize("name", ["pvt_classifier", "vit_classifier"])
def test_learned_positions_start_at_the_sincos_table(name):
    model = build(name, **SMALL)
    state = nnx.state(model, nnx.Param)
    table = np.asarray(state["encoder"]["positions"]["table"][...])
    grid = (64 // model.encoder.patch,) * 2
    leading = int(name == "vit_classifier")
    assert (table[:, :leading] == 0).all()
    expected = sincos_table(model.encoder.widths[0], grid).reshape(1, -1, model.encoder.widths[0])
    np.testing.assert_array_equal(table[:, leading:], expected)
    graph, params = nnx.split(model, nnx.Param)[:2]
    images = random_images()
    gradient = jax.jit(jax.grad(lambda params: jnp.square(1e5 * nnx.merge(graph, params)(images)).sum()))(params)
    assert (np.asarray(gradient["encoder"]["positions"]["table"][...]) != 0).any(-1).all()


@pytest.mark.parametrize("name", ["pvt_um", "vit_um", "simmim_pvt", "simmim_vit"])
def test_positions_are_fixed_in_pre_training(name):
    assert "positions" not in nnx.state(build(name), nnx.Param)["encoder"]


def drop_paths(model):
    stages = getattr(model.encoder, "stages", [model.encoder])
    return [block.drop for stage in stages for block in stage.blocks]


@pytest.mark.parametrize(("name", "depths"), [(NAMES[0], (2, 1, 1, 1)), (NAMES[1], (2, 1, 1, 1)), (NAMES[2], (5,))])
def test_the_drop_path_rate_rises_linearly_over_all_blocks(name, depths):
    drops = drop_paths(build(name, depths=depths, drop_path=0.2, **SMALL))
    np.testing.assert_allclose([drop.rate for drop in drops], [0, 0.05, 0.1, 0.15, 0.2])
    assert [drop.block for drop in drops] == list(range(5))


@pytest.mark.parametrize("name", ["swin_um_window8", "pvt_um", "vit_um", "simmim_vit"])
def test_nothing_is_dropped_in_pre_training(name):
    assert all(drop.rate == 0 for drop in drop_paths(build(name)))


@pytest.mark.parametrize("name", NAMES)
def test_without_keys_nothing_is_dropped(name):
    images = random_images()
    with_rate, without = (run(build(name, drop_path=rate, **SMALL), images) for rate in (0.5, 0.0))
    np.testing.assert_array_equal(with_rate, without)


@pytest.mark.parametrize("name", NAMES)
def test_dropped_branches_depend_only_on_the_key_of_the_image(name):
    """Neither the position of an image in the batch nor the other images change its dropped branches."""
    model = build(name, drop_path=0.5, **SMALL)
    images, keys = random_images(4), jax.random.split(jax.random.key(5), 4)
    together = np.asarray(encode(model, images, keys).maps[-1])
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(encode(model, images[order], keys[order]).maps[-1], together[order], atol=1e-4)
    np.testing.assert_allclose(encode(model, images[3:], keys[3:]).maps[-1], together[3:], atol=1e-4)
    same = np.asarray(encode(model, jnp.repeat(images[:1], 4, axis=0), keys).maps[-1])
    assert len({image.round(3).tobytes() for image in same}) > 1


def test_a_block_drops_its_two_branches_independently():
    """Only the second of the two blocks drops, with rate 0.5: its two branches give four equally likely outputs."""
    model = build("vit_classifier", drop_path=0.5, **SMALL)
    images = jnp.repeat(random_images(1), 256, axis=0)
    outputs = np.asarray(encode(model, images, jax.random.split(jax.random.key(0), 256)).maps[-1])
    representatives, counts = [], []
    for output in outputs:
        for number, known in enumerate(representatives):
            if np.abs(output - known).max() < 1e-4:
                counts[number] += 1
                break
        else:
            representatives.append(output)
            counts.append(1)
    assert len(counts) == 4
    assert min(counts) > 35  # 64 expected


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_kept_branches_are_scaled_to_keep_the_expectation(rate):
    keys = jax.random.split(jax.random.key(1), 5000)
    x = jnp.broadcast_to(jnp.array([[1.0, -2.0], [3.0, 4.0]]), (5000, 2, 2))
    dropped = np.asarray(DropPath(rate, block=3)(x, keys, 1))
    kept = (dropped != 0).any((1, 2))
    np.testing.assert_allclose(dropped[kept], np.asarray(x)[kept] / (1 - rate), rtol=1e-6)
    assert (dropped[~kept] == 0).all()
    assert kept.mean() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / 5000) ** 0.5)


def test_blocks_and_branches_drop_independently():
    keys, ones = jax.random.split(jax.random.key(1), 2000), jnp.ones((2000, 1))
    dropped = [DropPath(0.5, block)(ones, keys, branch)[:, 0] for block in range(3) for branch in (0, 1)]
    np.testing.assert_allclose(np.corrcoef(np.stack(dropped)), np.eye(6), atol=0.12)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swin_classifier", {"image_size": (96, 160), "channels": 1, "classes": 3}),  # windows do not tile the grids
        ("pvt_classifier", {"image_size": (64, 96), "channels": 1, "classes": 3}),
        ("vit_classifier", {"image_size": (24, 56), "channels": 1, "classes": 3}),
    ],
)
def test_other_shapes_give_finite_logits(name, changes):
    logits = run(build(name, **changes), random_images(2, changes["image_size"], 1))
    assert logits.shape == (2, 3)
    assert np.isfinite(logits).all()


def parameter_names(model):
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize("name", NAMES)
def test_layer_indices_follow_the_block_numbers_of_the_reference(name):
    """The reference numbers blocks through all stages; merges belong to a stage's first block (SPEC 10, 13)."""
    config = golden.config_of(name)
    model = nnx.eval_shape(lambda: build_model(config, ConstantRngs()))
    last = sum(config.model.depths) + 1
    assert model.num_layers == last
    layers = {parameter: model.layer_index(parameter) for parameter in parameter_names(model)}
    for parameter, layer in layers.items():
        theirs = reference_entry(config, parameter).name
        if match := re.match(r"blocks\.(\d+)\.", theirs):
            assert layer == int(match[1]) + 1, parameter
        elif theirs.startswith(("patch_embed", "pos_embed", "cls_token")):
            assert layer == 0, parameter
        else:
            assert theirs.startswith(("head", "fc_norm")), parameter
            assert layer == last, parameter
    assert set(layers.values()) == set(range(last + 1))


@pytest.mark.parametrize(
    ("name", "parameter", "layer"),
    [
        ("swin_classifier", "encoder.patch_norm.scale", 0),
        ("swin_classifier", "encoder.stages.1.merge.proj.kernel", 3),
        ("swin_classifier", "encoder.stages.1.blocks.1.position.fc1.bias", 4),
        ("pvt_classifier", "encoder.positions.table", 0),
        ("pvt_classifier", "encoder.stages.2.merge.kernel", 4),
        ("vit_classifier", "encoder.class_token", 0),
        ("vit_classifier", "encoder.blocks.1.qkv.kernel", 2),
        ("vit_classifier", "head_norm.scale", 3),
    ],
)
def test_layers_by_name(name, parameter, layer):
    model = nnx.eval_shape(lambda: build_model(golden.config_of(name), ConstantRngs()))
    assert parameter in parameter_names(model)
    assert model.layer_index(parameter) == layer


UNKNOWN = (
    *("decoder_embed.kernel", "encoder.adapter.kernel", "encoder.norm.scale", "header.kernel"),
    *("encoder.stages.0.blocks.2.qkv.kernel", "encoder.stages.4.blocks.0.qkv.kernel", "stages.0.blocks.0.qkv.kernel"),
)


@pytest.mark.parametrize("parameter", UNKNOWN)
def test_an_unknown_parameter_has_no_layer(parameter):
    model = nnx.eval_shape(lambda: build_model(golden.config_of("swin_classifier"), ConstantRngs()))
    with pytest.raises(ValueError, match=re.escape(parameter)):
        model.layer_index(parameter)
