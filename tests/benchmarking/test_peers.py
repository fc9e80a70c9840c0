"""PyTorch peers: the plain UM-MAE has our loss and gradients, and the others have our sizes."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from tests import golden, tiny
from tests.models import small
from tests.rngs import ConstantRngs
from tests.small import random_model
from umae_jax.benchmarking import peers
from umae_jax.errors import UserError
from umae_jax.models.build import build_model
from umae_jax.weights import names

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
needs_both = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="torch and transformers are not both installed",
)
VIT = {"encoder": "vit", "patch": 8, "widths": (8,), "depths": (2,), "heads": (2,), "mlp_ratios": (4,)}
MODELS = {
    "torch_um_mae": {},
    "hf_vit_mae": VIT | {"method": "mae", "decoder_factor": 1, "secondary_ratio": 0.0},
    "hf_swin_simmim": {"method": "simmim", "norm_pix_loss": False, "secondary_ratio": 0.0},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Limit PyTorch to one thread: parallel tests would compete for cores."""
    if not importlib.util.find_spec("torch"):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(name, **changes):
    config = tiny.get_config()
    with config.unlocked():
        config.model.update(MODELS[name] | changes)
    return config


def parameters_of(config):
    params = nnx.state(nnx.eval_shape(lambda: build_model(config, ConstantRngs())), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@needs_both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", peers.PEERS)
def test_steps_lower_the_loss(name, dtype):
    import torch

    torch.manual_seed(0)
    config = config_of(name)
    config.dtype = dtype
    config.optimizer.base_learning_rate = 1.0  # for 256 images
    peer = peers.make_peer(name, config, batch_size=2)
    losses = []
    for _ in range(12):
        peer.step()
        losses.append(peer.loss)
    assert np.mean(losses[-3:]) < 0.99 * np.mean(losses[:3])


@needs_both
@pytest.mark.parametrize("name", ["torch_um_mae", "hf_vit_mae"])
def test_a_peer_has_our_number_of_parameters(name):
    config = config_of(name)
    assert peers.make_peer(name, config, batch_size=1).parameters == parameters_of(config)


@needs_both
@pytest.mark.parametrize("window", [4, 8, 16])
def test_hugging_face_swin_differs_only_in_positions_and_merges(window):
    config = config_of("hf_swin_simmim", window=window)
    model, theirs = config.model, peers.make_peer("hf_swin_simmim", config, batch_size=1).parameters
    for stage, depth in enumerate(model.depths):
        heads, width = model.heads[stage], model.position_width
        table = (2 * min(window, 8 // 2**stage) - 1) ** 2 * heads
        theirs += depth * (2 * width + width + width * heads + heads - table)
    theirs -= 4 * model.widths[0]  # its merge normalises four times the channels (+ 8 - 2), and has no bias (- 2)
    assert theirs == parameters_of(config)


def torch_and_jax(config):
    """Return our model with random parameters, and the plain one with the same parameters."""
    import torch

    from umae_jax.benchmarking.torch_um_mae import TorchUmMae

    graph, params = random_model(config)
    plain = TorchUmMae(config)
    tensors = names.to_reference(config, params)
    plain.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()})
    return graph, params, plain


def torch_mask(mask):
    import torch

    from umae_jax.benchmarking.torch_um_mae import TorchMask

    return TorchMask(torch.tensor(np.asarray(mask.offset), dtype=torch.int64), torch.tensor(np.asarray(mask.hidden)))


def channels_first(images):
    import torch

    return torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy())


TWO_STAGES = {"depths": (2, 2), "widths": (8, 16), "heads": (1, 2), "mlp_ratios": (4, 4)}


@needs_torch
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("swin_um_window8", TWO_STAGES | {"window": 8, "image_size": (64, 64)}),
        ("swin_um_window8", TWO_STAGES | {"decoder_factor": 1, "image_size": (64, 128)}),
        ("swin_um_window4_no_secondary", {}),  # shifts cut through units
    ],
)
def test_plain_um_mae_has_our_loss_and_gradients(kind, changes):
    config = small.config_of(kind, **changes)
    graph, params, plain = torch_and_jax(config)
    images, mask = small.random_case(nnx.merge(graph, params))

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        return nnx.merge(graph, params)(images, mask)[0]

    loss, gradients = ours(params)
    theirs = plain(channels_first(images), torch_mask(mask))
    theirs.backward()
    np.testing.assert_allclose(theirs.item(), loss, rtol=1e-5)
    gradients = names.to_reference(config, gradients)
    for name, parameter in plain.named_parameters():
        expected, found = gradients[name], parameter.grad.numpy()
        if name.endswith("posmlp.2.bias"):  # shifts whole softmax rows; its exact gradient is 0
            assert max(np.abs(expected).max(), np.abs(found).max()) < 1e-5
        else:
            assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected), name


@needs_torch
@pytest.mark.parametrize("kind", ["swin_um_window8", "swin_um_window4_no_secondary"])
def test_plain_um_mae_has_the_latents_of_the_golden_files(kind):
    import torch

    from umae_jax.benchmarking.torch_um_mae import TorchUmMae

    numbers = golden.load(kind)
    config = golden.config_of(kind)
    config.model.reference_order = False  # affects the decoder only
    plain = TorchUmMae(config)
    params = golden.part(numbers, "param")
    missing, unexpected = plain.load_state_dict(
        {name: torch.from_numpy(array) for name, array in params.items()}, strict=False
    )
    assert (missing, unexpected) == (["decoder_pos_embed"], [])  # a fixed table
    mask = torch_mask(golden.mask_of(numbers, golden.model_of(kind)))
    with torch.no_grad():
        units = plain.cut_units(channels_first(numbers["images"]))
        latent = plain.encode(units[torch.arange(2)[:, None], plain.unit_indices(mask)[0]], mask)
    np.testing.assert_allclose(latent.flatten(1, 2), numbers["latent"], atol=2e-5)


@needs_torch
def test_plain_um_mae_draws_new_masks_that_hide_a_quarter():
    from umae_jax.benchmarking.torch_um_mae import TorchUmMae

    model = TorchUmMae(small.config_of("swin_um_window8"))
    one, other = model.sample_mask(200), model.sample_mask(200)
    assert (one.offset != other.offset).any()
    counts = np.bincount(one.offset.flatten().numpy())
    np.testing.assert_allclose(counts / counts.sum(), 0.25, atol=0.03)
    assert (one.hidden.sum((1, 2)) == 4).all()
    np.testing.assert_allclose(one.hidden.float().mean(0), 0.25, atol=0.15)
    numbers = np.concatenate([part.numpy() for part in model.unit_indices(one)], axis=1)
    np.testing.assert_array_equal(np.sort(numbers), np.broadcast_to(np.arange(64), (200, 64)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("timm", {}, "timm.*torch_um_mae, hf_vit_mae, hf_swin_simmim"),
        ("hf_vit_mae", {}, "model.encoder=vit and model.method=mae.*choose torch_um_mae"),
        ("torch_um_mae", {"encoder": "pvt"}, "torch_um_mae.*pvt"),
    ],
)
def test_a_peer_of_another_model_is_an_error(name, changes, message):
    with pytest.raises(UserError, match=message):
        peers.make_peer(name, config_of("torch_um_mae", **changes), batch_size=1)


@needs_both
@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("torch_um_mae", "reference_order", True, "^model.reference_order: .*False"),
        ("torch_um_mae", "decoder_factor", 3, "^model.decoder_factor: 3"),
        ("hf_vit_mae", "secondary_ratio", 0.25, "^model.secondary_ratio: .*0"),
        ("hf_vit_mae", "image_size", (32, 64), "^image_size: .*32 x 64"),
        ("hf_swin_simmim", "image_size", (32, 64), "^image_size: .*32 x 64"),
        ("hf_swin_simmim", "widths", (8, 24), r"^model.widths: .*\(8, 24\)"),
        ("hf_swin_simmim", "mlp_ratios", (4, 2), r"^model.mlp_ratios: .*\(4, 2\)"),
        ("hf_swin_simmim", "norm_pix_loss", True, "^model.norm_pix_loss: .*False"),
    ],
)
def test_an_unsupported_value_is_an_error(name, key, value, message):
    config = config_of(name)
    with config.unlocked():
        setattr(config if key in config else config.model, key, value)
    with pytest.raises(UserError, match=message):
        peers.make_peer(name, config, batch_size=1)


@pytest.mark.parametrize(("name", "missing"), [("torch_um_mae", "torch"), ("hf_vit_mae", "transformers")])
def test_a_missing_package_is_an_error(monkeypatch, name, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # makes its import fail
    monkeypatch.delitem(sys.modules, "umae_jax.benchmarking.torch_um_mae", raising=False)
    with pytest.raises(UserError, match=r"pip install \"umae_jax\[peers\]\""):
        peers.make_peer(name, config_of(name), batch_size=1)


def test_torch_is_not_imported_before_a_peer_is_made():
    code = "import sys, umae_jax, umae_jax.benchmarking.peers; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
