"""The whole detector: variants, padding, devices, and the sizes of its parts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny_detector
from tests.detection import scenes
from tests.rngs import ConstantRngs
from umae_jax.config import default_config, load_config
from umae_jax.detection.detector import Detected, total_loss
from umae_jax.tasks.detection import Task
from umae_jax.training.sharding import batch_sharding, make_mesh, replicated
from umae_jax.training.step import loss_function
from umae_jax.training.task import Params

ENCODERS = {
    "pvt": {"encoder": "pvt", "sr_ratios": (8, 4, 2, 1)},
    "vit": {"encoder": "vit", "patch": 16, "widths": (8,), "depths": (1,), "heads": (2,), "mlp_ratios": (2,)},
}


def config_of(encoder=None, **model):
    """Return the tiny configuration, with another encoder and other keys of the model."""
    config = tiny_detector.get_config()
    config.batch_size = 2
    with config.unlocked():
        if encoder is not None:
            del config.model.window, config.model.position_width
            config.model.update(ENCODERS[encoder])
        config.model.update({"classes": 2, "masks": True, **model})
    return config


def split(config):
    """Return the task, the graph of its model, and its initial parameters."""
    task = Task(config)
    graph, params = nnx.split(task.build_model(nnx.Rngs(0)))
    return task, graph, params


PLAIN = {"interleaved": False, "mask_flow": False, "global_block": False, "nms": "hard"}  # all before HTC
LINEAR = {"box_convs": 0, "box_loss": "smooth_l1"}  # as the first box heads were
VARIANTS = {
    "faster_rcnn_pvt": ("pvt", {"stages": 1, "masks": False, **PLAIN, **LINEAR}),
    "mask_rcnn_vit": ("vit", {"stages": 1, **PLAIN, **LINEAR}),
    "cascade": ("vit", {"stages": 2, **PLAIN, "semantic_classes": 4}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_all_of_its_parts(name):
    encoder, model = VARIANTS[name]
    config = config_of(encoder, **model)
    task, graph, params = split(config)
    batch = scenes.draw(config, 2)
    step = jax.jit(jax.value_and_grad(loss_function(task, graph), has_aux=True))
    (loss, outputs), gradient = step(params, batch)
    kinds = ["class", "box", "accuracy", *(["mask"] if config.model.masks else [])]
    stages = {f"stage_{stage}_{kind}" for stage in range(config.model.stages) for kind in kinds}
    semantic = {"semantic"} if config.model.semantic_classes else set()
    assert outputs.scalars.keys() == {"rpn_class", "rpn_box"} | stages | semantic
    assert np.isfinite(loss)
    np.testing.assert_allclose(loss, total_loss(outputs.scalars), rtol=1e-6)
    parts = {}
    for keys, variable in nnx.to_flat_state(gradient):
        part = ".".join(map(str, keys[:3] if keys[0] == "roi_heads" else keys[:2]))
        parts[part] = max(parts.get(part, 0), float(np.abs(variable[...]).max()))
    assert np.isfinite([*parts.values()]).all()
    assert all(value > 0 for value in parts.values()), parts
    assert {f"roi_heads.box_heads.{stage}" for stage in range(config.model.stages)} <= parts.keys()
    assert (f"roi_heads.mask_heads.{config.model.stages - 1}" in parts) == config.model.masks
    assert ("roi_heads.semantic_head.lateral" in parts) == bool(semantic)

    found = jax.eval_shape(nnx.merge(graph, params), batch["image"], batch["image_size"])
    assert isinstance(found, Detected)
    assert found.boxes.shape == (2, config.model.detections, 4)
    masks = (2, config.model.detections, 28, 28) if config.model.masks else None
    assert (None if found.masks is None else found.masks.shape) == masks


class Computed(NamedTuple):
    """Losses, statistics and gradients of a batch that leaves a part of the canvas empty."""

    batch: dict[str, np.ndarray]
    params: Params
    step: Callable  # (params, pixels, batch) -> (loss, outputs), gradients of parameters and pixels
    compiled: Callable  # the step on one device
    results: tuple

    def __call__(self, **changes):
        batch = self.batch | changes
        return self.compiled(self.params, batch["image"], batch)


@pytest.fixture(scope="module")
def computed():
    config = config_of(stages=1, box_convs=2)
    task, graph, params = split(config)
    batch = scenes.draw(config, 2)
    batch["image"] = np.asarray(scenes.normalised(nnx.merge(graph, params), batch["image"]))
    params = perturbed(params)  # the initial ones give almost equal features, whose BatchNorm amplifies rounding

    def loss(params, pixels, batch):
        return loss_function(task, graph)(params, batch | {"image": pixels})

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    compiled = jax.jit(step)
    return Computed(batch, params, step, compiled, compiled(params, batch["image"], batch))


def equal(one, other):
    """Return whether all arrays of two pytrees are equal, bit for bit."""
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)))


def perturbed(params, spread=0.2):
    """Return parameters with noise, and the same running statistics."""
    rng = np.random.default_rng(0)

    def draw(variable):
        array = np.asarray(variable[...])
        if isinstance(variable, nnx.BatchStat):
            return variable
        fan_in = array.size // array.shape[-1] if array.ndim > 1 else 1
        return variable.replace((array + spread * rng.normal(size=array.shape) / fan_in**0.5).astype(np.float32))

    return jax.tree.map(draw, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def test_no_gradient_reaches_pixels_beyond_the_content(computed):
    _, (_, gradient) = computed.results
    gradient = np.abs(gradient)
    height, width = computed.batch["image_size"][0]
    assert (gradient[:, :height, :width].max((1, 2, 3)) > 0).all()
    assert gradient[:, height:].max() == 0
    assert gradient[:, :, width:].max() == 0


def test_pixels_beyond_the_content_change_nothing(computed):
    pixels = computed.batch["image"]
    height, width = computed.batch["image_size"][0]
    changed = np.random.default_rng(0).normal(size=pixels.shape).astype(np.float32)
    changed[:, :height, :width] = pixels[:, :height, :width]
    assert equal(computed(image=changed), computed.results)
    changed[0, 0, 0] += 1
    assert not equal(computed(image=changed), computed.results)


def test_objects_beyond_the_last_change_nothing(computed):
    changed = scenes.with_noise_in_invalid_slots(computed.batch, classes=2)
    assert not all(np.array_equal(changed[name], computed.batch[name]) for name in ("boxes", "labels", "masks"))
    assert equal(computed(**changed), computed.results)
    changed["boxes"][0, 0] += 1
    assert not equal(computed(**changed), computed.results)


def test_losses_gradients_and_statistics_are_equal_on_one_device_and_two(computed):
    """BatchNorm over the RoIs of one device alone would change all three."""
    (one, one_outputs), (one_gradient, _) = computed.results
    mesh = make_mesh(devices=jax.devices()[:2])
    sharded = batch_sharding(mesh)
    step = jax.jit(computed.step, in_shardings=(replicated(mesh), sharded, sharded), out_shardings=replicated(mesh))
    with jax.set_mesh(mesh):
        (two, outputs), (gradient, _) = step(computed.params, computed.batch["image"], computed.batch)
    np.testing.assert_allclose(two, one, rtol=1e-5)
    for name, value in one_outputs.scalars.items():
        np.testing.assert_allclose(outputs.scalars[name], value, rtol=1e-4, atol=1e-7, err_msg=name)
    assert len(jax.tree.leaves(outputs.statistics)) == 2 * 2  # mean and variance, convolutions
    for ours, theirs in ((outputs.statistics, one_outputs.statistics), (gradient, one_gradient)):
        for (keys, one), (_, two) in zip(nnx.to_flat_state(theirs), nnx.to_flat_state(ours), strict=True):
            scale = max(np.abs(one[...]).max(), 1e-4)  # a bias of all of a softmax has no gradient
            np.testing.assert_allclose(two[...], one[...], rtol=0, atol=3e-3 * scale, err_msg=str(keys))


# Sizes.


def size_of(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("size", "dim", "published"), [("swin_large", 192, 283.7e6), ("swin_base", 128, 159.5e6)])
def test_htcpp_has_the_published_parameters_but_for_our_swin(size, dim, published):
    """DETECTION, Status: 283.7 M and 159.5 M with the standard Swin, whose window is 7."""
    config = load_config("detect_htcpp_swin_large")
    encoder = default_config(size, "detector").model
    config.model.update({key: encoder[key] for key in ("widths", "depths", "heads", "position_width")})
    params = nnx.state(nnx.eval_shape(lambda: Task(config).build_model(ConstantRngs())), nnx.Param)
    widths, depths, heads = [dim, 2 * dim, 4 * dim, 8 * dim], config.model.depths, config.model.heads
    assert list(config.model.widths) == widths
    blocks = sum(depth * (12 * d**2 + 13 * d) for depth, d in zip(depths, widths, strict=True))
    embed = 3 * 16 * dim + 3 * dim  # linear layer and norm
    norms = 2 * sum(widths)  # of the four maps
    hidden = config.model.position_width
    position = sum(depth * (3 * hidden + (hidden + 1) * n) for depth, n in zip(depths, heads, strict=True))
    merges = sum(2 * d + 4 * d * 2 * d + 2 * d for d in widths[:3])  # norm of d; 2 x 2 convolution with bias
    assert size_of(params["backbone"]["encoder"]) == embed + blocks + position + merges
    last = widths[-1]
    assert size_of(params["backbone"]["global_block"]) == 12 * last**2 + 13 * last
    assert size_of(params["backbone"]) == embed + blocks + position + merges + norms + 12 * last**2 + 13 * last

    fpn = sum(256 * d + 256 for d in widths) + 4 * (9 * 256**2 + 256)
    rpn = 9 * 256**2 + 256 + 15 * 257
    convolution = 9 * 256**2 + 256
    mask_head = 4 * convolution + 4 * 256**2 + 256 + 80 * 257
    masks = 3 * mask_head + 2 * (256**2 + 256)  # mask flow into the second and third
    semantic = 5 * (256**2 + 256) + 4 * convolution + 256**2 + 256 + 183 * 257
    box_head = 4 * (9 * 256**2 + 2 * 256) + 49 * 256 * 1024 + 1024 + 81 * 1025 + 4 * 1025
    expected = {"fpn": fpn, "rpn": rpn, "mask_heads": masks, "semantic_head": semantic, "box_heads": 3 * box_head}
    heads_of = params["roi_heads"]
    parts = {"fpn": params["fpn"], "rpn": params["rpn"]}
    parts |= {name: heads_of[name] for name in ("mask_heads", "semantic_head", "box_heads")}
    assert {name: size_of(part) for name, part in parts.items()} == expected
    if size == "swin_large":
        stated = {"fpn": 3.10, "rpn": 0.59, "mask_heads": 8.1, "semantic_head": 2.8, "box_heads": 45.9}
        for name, millions in stated.items():
            assert expected[name] / 1e6 == pytest.approx(millions, abs=0.06), name

    # The standard Swin has tables of 13 x 13 biases per head, and merges with a norm of 4 d and no bias.
    tables = sum(depth * 13**2 * n for depth, n in zip(depths, heads, strict=True))
    their_merges = sum(8 * d + 8 * d**2 for d in widths[:3])
    standard = size_of(params) - position - merges + tables + their_merges
    assert standard == pytest.approx(published, abs=0.1e6)
    assert size_of(params) - standard == position - tables + merges - their_merges
