import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden, small
from umae_jax.errors import UserError
from umae_jax.weights.files import Weights, encode_weights, read_weights
from umae_jax.weights.names import from_reference, to_reference


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", small.KINDS)
def test_export_and_import_are_the_identity_bit_for_bit(kind, suffix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    config = golden.config_of(kind)
    _, params = small.random_model(config)
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(encode_weights(path.suffix, Weights(to_reference(config, params), {"a": "b"})))
    tensors, metadata = read_weights(path)
    assert metadata == {"a": "b"}
    assert_same(from_reference(config, params, tensors, name="weights"), params)
    again = to_reference(config, from_reference(config, params, tensors, name="weights"))
    assert again.keys() == tensors.keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, tensors[name], strict=True)


@pytest.mark.parametrize("kind", small.KINDS)
def test_all_names_and_shapes_are_those_of_the_reference(kind):
    theirs = golden.part(golden.load(kind, large=True), "param")
    config = golden.config_of(kind)
    ours = to_reference(config, small.random_model(config)[1])
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
    for table in {"pos_embed", "decoder_pos_embed"} & theirs.keys() - (
        {"pos_embed"} if "classifier" in kind else set()
    ):
        np.testing.assert_allclose(ours[table], theirs[table], atol=1e-5)


def test_convolutions_have_the_layout_of_torch():
    torch = pytest.importorskip("torch")
    config = golden.config_of("pvt_um")
    graph, params = small.random_model(config)
    tensors = to_reference(config, params)
    weight, bias = (torch.tensor(tensors[f"patch_embed.proj.{leaf}"]) for leaf in ("weight", "bias"))
    images = np.random.default_rng(0).normal(size=(1, 8, 12, 3)).astype(np.float32)
    theirs = torch.nn.functional.conv2d(torch.from_numpy(images).permute(0, 3, 1, 2), weight, bias, stride=4)
    ours = nnx.merge(graph, params).encoder.embed(images)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


def test_one_error_lists_everything_that_does_not_fit():
    config = golden.config_of("swin_um_window8")
    params = small.random_model(config)[1]
    tensors = to_reference(config, params)
    del tensors["norm.weight"], tensors["blocks.3.mlp.fc1.bias"]
    tensors["surprise"] = np.zeros(3, np.float32)
    tensors["decoder_pred.bias"] = np.zeros(10, np.float32)
    tensors["decoder_pos_embed"] = tensors["decoder_pos_embed"] + 1
    tensors["mask_token"] = tensors["mask_token"] * np.nan
    with pytest.raises(UserError) as raised:
        from_reference(config, params, tensors, name="weights.pth")
    for part in (
        "weights.pth does not fit the configured swin for um_mae",
        "2 missing: blocks.3.mlp.fc1.bias, norm.weight",
        "1 unexpected: surprise",
        "decoder_pred.bias is [10], not [768]",
        "decoder_pos_embed is not the fixed sin-cos table",
        "mask_token is not finite",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("kind", ["swin_um_window8", "pvt_um", "vit_random"])
def test_fixed_tables_may_have_the_rounding_of_their_dtype(kind, dtype):
    config = golden.config_of(kind)
    params = small.random_model(config)[1]
    rounded = {name: array.astype(dtype) for name, array in to_reference(config, params).items()}
    for tensors in (rounded, {name: array.astype(np.float32) for name, array in rounded.items()}):
        from_reference(config, params, tensors, name="weights")
    rounded["decoder_pos_embed"] = rounded["decoder_pos_embed"] + np.asarray(0.02, dtype)
    with pytest.raises(UserError, match="decoder_pos_embed is not the fixed sin-cos table"):
        from_reference(config, params, rounded, name="weights")


def test_fixed_tables_are_optional_and_an_encoder_can_be_read_alone():
    config = golden.config_of("vit_um")
    params = small.random_model(config)[1]
    tensors = to_reference(config, params)
    encoder = {name: array for name, array in tensors.items() if not re.match("decoder_|mask_token|pos_embed", name)}
    alone = from_reference(config, params, encoder, name="weights", only="encoder.")
    assert_same(alone["encoder"], params["encoder"])
    with pytest.raises(UserError, match=r"weights holds only an encoder.*umae_jax.load_encoder"):
        from_reference(config, params, encoder, name="weights")
