import numpy as np
import pytest
from flax import nnx

from tests import golden, small
from tests.rngs import ConstantRngs
from umae_jax.config import ENCODERS, default_config, methods_of
from umae_jax.errors import UserError
from umae_jax.models.build import build_model
from umae_jax.weights.names import reference_entry, to_reference
from umae_jax.weights.recognize import recognize


def shapes_of(config):
    """Return a state dict with the reference's names, of arrays that take no memory."""
    params = nnx.state(nnx.eval_shape(lambda: build_model(config, ConstantRngs())), nnx.Param)
    state = {}
    for keys, variable in nnx.to_flat_state(params):
        name, layout = reference_entry(config, ".".join(map(str, keys)))
        state[name] = layout.to_theirs(np.broadcast_to(np.float32(0), variable.shape))
    return state


@pytest.mark.parametrize(
    ("size", "method"),
    [(size, "um_mae") for encoder in ENCODERS.values() for size in encoder.sizes]
    + [
        (size, method) for size in ("swin_tiny", "pvt_small", "vit_small") for method in methods_of(size)[1:-1]
    ],  # no detector
)
def test_every_preset_is_recognized_from_its_shapes(size, method):
    config = default_config(size, method)
    recognized = recognize(shapes_of(config), "weights")
    if method == "um_mae" and "vit" not in size:
        config.model.reference_order = True  # the reference trained it
    assert recognized.model.to_dict() == config.model.to_dict()
    assert recognized.image_size == config.image_size


def test_image_sizes_follow_position_tables():
    config = golden.config_of("swin_um_window8")
    tensors = to_reference(config, small.random_model(config)[1])
    with pytest.raises(UserError, match=r"weights .*decoder of width 32.* heads.*--config"):
        recognize(tensors, "weights")
    config = default_config("vit_small", "classifier")
    config.image_size = (96, 96)
    assert recognize(shapes_of(config), "weights").image_size == (96, 96)
    config.image_size = (96, 128)
    with pytest.raises(UserError, match=r"weights .*48 patches of 16 pixels.*image_size"):
        recognize(shapes_of(config), "weights")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"layer1.0.conv1.weight": np.zeros(3)}, "unknown architecture.* layer1.0.conv1.weight"),
        (lambda state: {k: v for k, v in state.items() if "blocks.1.norm1" not in k}, "a vit without 'blocks.1"),
        (lambda state: state | {"patch_embed.proj.weight": np.zeros((384, 5, 16, 16))}, "of 5 channels .*mean and std"),
        (
            lambda state: {k: v for k, v in state.items() if "blocks.11" not in k},
            r"depths \(11,\).* heads",
        ),
    ],
)
def test_state_dicts_that_cannot_be_recognized_raise_one_sentence(change, message):
    state = shapes_of(default_config("vit_small", "mae"))
    with pytest.raises(UserError, match=message) as raised:
        recognize(change(state), "weights")
    assert "\n" not in str(raised.value)


def test_an_encoder_is_recognized_beside_a_decoder_of_unknown_heads():
    config = golden.config_of("vit_um")
    config.model.widths, config.model.depths = (384,), (12,)
    state = shapes_of(default_config("vit_small", "mae")) | {"mask_token": np.zeros((1, 1, 24))}
    with pytest.raises(UserError, match=r"decoder of width 24.* heads"):
        recognize(state, "weights")
    assert recognize(state, "weights", encoder_only=True).model.widths == (384,)
    del state["blocks.0.norm1.weight"]
    with pytest.raises(UserError, match=r"a vit without 'blocks.0.norm1.weight'"):
        recognize(state, "weights")
    with pytest.raises(UserError, match=r"a vit without 'blocks.0'"):
        recognize({"cls_token": np.zeros(3), "patch_embed.proj.weight": np.zeros((8, 3, 4, 4))}, "weights")


def test_an_encoder_alone_is_recognized():
    state = {
        k: v for k, v in shapes_of(default_config("vit_small", "mae")).items() if not k.startswith(("dec", "mask"))
    }
    assert recognize(state, "weights").model.widths == (384,)
