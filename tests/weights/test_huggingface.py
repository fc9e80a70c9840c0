"""Exported weights give the same numbers in transformers and, if it is installed, in timm."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden, small
from tests.runs import store
from umae_jax.random_masking import RandomMask
from umae_jax.weights.exchange import export_weights
from umae_jax.weights.files import read_weights
from umae_jax.weights.huggingface import LAYOUTS, from_huggingface, to_huggingface
from umae_jax.weights.names import to_reference


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


def channels_first(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["vit_random", "vit_um"])
def test_conversion_and_its_inverse_are_the_identity(layout, kind):
    tensors = to_reference(golden.config_of(kind), small.random_model(golden.config_of(kind))[1])
    restored = from_huggingface(to_huggingface(layout, tensors))
    expected = {
        name: array
        for name, array in tensors.items()
        if name != "vis_mask_token" and (layout == "vit_mae" or not name.startswith(("decoder_", "mask_token")))
    }
    assert restored.keys() == expected.keys()
    for name, array in restored.items():
        np.testing.assert_array_equal(array, expected[name], strict=True)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_vit_mae_of_transformers_predicts_the_same(tmp_path, images, norm_pix_loss):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = golden.config_of("vit_random")
    config.model.norm_pix_loss = norm_pix_loss
    graph, params = small.random_model(config)
    store(tmp_path / "run", config, params)
    export_weights(tmp_path / "run", tmp_path / "hub" / "model.safetensors", "vit_mae")

    theirs, report = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    order = np.stack([np.random.default_rng(seed).permutation(64) for seed in range(2)])
    mask = RandomMask(jnp.asarray(order.reshape(2, 4, 4, 4), jnp.int32), jnp.zeros((2, 4, 4), bool))
    noise = np.argsort(order, axis=1) / 64  # smaller noise is sampled earlier
    with torch.no_grad():
        output = theirs(torch.from_numpy(channels_first(images)), noise=torch.tensor(noise, dtype=torch.float32))
    loss, prediction = nnx.merge(graph, params)(jnp.asarray(images), mask)
    assert float(loss) == pytest.approx(float(output.loss), rel=1e-5)
    expected = np.take_along_axis(output.logits.numpy(), order[:, 16:, None], axis=1)
    np.testing.assert_allclose(np.asarray(prediction).reshape(2, 48, -1), expected, atol=1e-4)


def test_vit_model_of_transformers_gives_the_same_features(tmp_path, images):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = golden.config_of("vit_um")
    graph, params = small.random_model(config)
    store(tmp_path / "run", config, params)
    export_weights(tmp_path / "run", tmp_path / "hub" / "model.safetensors", "vit")

    theirs, report = transformers.ViTModel.from_pretrained(
        tmp_path / "hub", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        expected = theirs(torch.from_numpy(channels_first(images))).last_hidden_state.numpy()
    encoder = nnx.merge(graph, params).encoder
    features = encoder(encoder.embed(jnp.asarray(images)))
    np.testing.assert_allclose(features.class_token, expected[:, :1], atol=1e-4)
    np.testing.assert_allclose(features.maps[0].reshape(2, 64, -1), expected[:, 1:], atol=1e-4)
    processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(config.data.mean)


def test_timm_loads_the_reference_layout(tmp_path, images):
    torch = pytest.importorskip("torch")
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    config = golden.config_of("vit_classifier")
    graph, params = small.random_model(config)
    store(tmp_path / "run", config, params)
    export_weights(tmp_path / "run", tmp_path / "vit.safetensors", "reference")

    theirs = vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=10, global_pool="avg"
    )
    tensors = read_weights(tmp_path / "vit.safetensors").tensors
    theirs.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(channels_first(images))).numpy()
    np.testing.assert_allclose(nnx.merge(graph, params)(jnp.asarray(images)), expected, atol=1e-4)
