"""PyTorch training steps to time ours against, with the same sizes, precision and batch.

A step is the forward pass, the backward pass and AdamW, on normalised float32 images on the device, with new masks. The
steps run in eager mode with PyTorch's default threads and memory formats, without `torch.compile`. With bfloat16 the
forward pass runs under `torch.autocast`, and parameters stay in float32. Flips, gradient clipping, accumulation, moving
averages and schedules are left out, in the peer's favour.

Peers need `pip install "umae_jax[peers]"`; this module imports PyTorch only when a peer is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from umae_jax.errors import UserError, require
from umae_jax.models.autoencoder import DECODER_MLP_RATIO
from umae_jax.models.build import build_model
from umae_jax.models.layers import NORM_EPSILON

if TYPE_CHECKING:
    import torch

INSTALL = 'install torch and transformers: pip install "umae_jax[peers]"'
# The encoder and the method that each is comparable with.
PEER_OF = {
    "torch_um_mae": ("swin", "um_mae"),
    "hf_vit_mae": ("vit", "mae"),
    "hf_swin_simmim": ("swin", "simmim"),
}


class Network(NamedTuple):
    """A PyTorch model and its loss.

    Attributes:
        module: holds the parameters.
        loss: maps images, float32 [B, C, H, W], to a scalar.
    """

    module: torch.nn.Module
    loss: Callable[[torch.Tensor], torch.Tensor]


class Peer:
    """A training step in PyTorch with its state and one batch, on the first GPU or else the CPU.

    Attributes:
        parameters: number of trained parameters.
        loss: of the last step; nan before the first.
    """

    def __init__(self, network: Network, config: ConfigDict, batch_size: int) -> None:
        import torch

        self._network = network
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network.module.to(self._device).train()
        self._images = torch.randn(batch_size, config.model.channels, *config.image_size, device=self._device)
        trained = [parameter for parameter in network.module.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in trained)
        recipe = config.optimizer
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.base_learning_rate * batch_size / 256,
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
        self.loss = float("nan")

    def step(self) -> None:
        """Run one step; returns when it is done."""
        import torch

        self._optimizer.zero_grad()
        with self._autocast:
            loss = self._network.loss(self._images)
        loss.backward()
        self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.loss = loss.item()


def make_peer(name: str, config: ConfigDict, batch_size: int) -> Peer:
    """Make the peer of a configuration, with random parameters and images.

    Args:
        name: a key of PEERS.
        config: of our own step.
        batch_size: images per step.

    Raises:
        UserError: if there is no such peer, it is of another model, it does not support the configuration, or its
            packages are not installed.
    """
    require(name in PEERS, f"there is no peer {name!r}; choose {', '.join(PEERS)}")
    kind = (config.model.encoder, config.model.method)
    if kind != PEER_OF[name]:
        choice = next((f"choose {peer}" for peer, other in PEER_OF.items() if other == kind), "there is none for it")
        encoder, method = PEER_OF[name]
        raise UserError(
            f"{name} is for model.encoder={encoder} and model.method={method}, not {kind[0]} and {kind[1]}; {choice}"
        )
    nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))  # checks that the sizes are consistent
    try:
        network = PEERS[name](config)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); {INSTALL}") from None
    return Peer(network, config, batch_size)


def torch_um_mae(config: ConfigDict) -> Network:
    """Make UM-MAE with a Swin in plain PyTorch; see `torch_um_mae.py`."""
    from umae_jax.benchmarking.torch_um_mae import TorchUmMae

    require(not config.model.reference_order, "model.reference_order: not supported by torch_um_mae; set it to False")
    module = TorchUmMae(config)
    return Network(module, lambda images: module(images, module.sample_mask(len(images))))


def hf_vit_mae(config: ConfigDict) -> Network:
    """Make Hugging Face's `ViTMAEForPreTraining`: the same model, with the same number of parameters.

    Its decoder predicts all units, not only those in the loss.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = config.model
    side = _square(config, "hf_vit_mae")
    require(model.secondary_ratio == 0, "model.secondary_ratio: hf_vit_mae has no secondary masking; set it to 0")
    module = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=side,
            patch_size=model.patch,
            num_channels=model.channels,
            hidden_size=model.widths[0],
            num_hidden_layers=model.depths[0],
            num_attention_heads=model.heads[0],
            intermediate_size=model.mlp_ratios[0] * model.widths[0],
            layer_norm_eps=NORM_EPSILON,
            decoder_hidden_size=model.decoder_width,
            decoder_num_hidden_layers=model.decoder_depth,
            decoder_num_attention_heads=model.decoder_heads,
            decoder_intermediate_size=DECODER_MLP_RATIO * model.decoder_width,
            mask_ratio=0.75,
            norm_pix_loss=model.norm_pix_loss,
        )
    )
    return Network(module, lambda images: module(images).loss)


def hf_swin_simmim(config: ConfigDict) -> Network:
    """Make Hugging Face's `SwinForMaskedImageModeling`: Microsoft's Swin, which differs a little from ours.

    Each block has a table of relative position biases instead of a small MLP, and a merge normalises four tokens
    together before a linear layer without bias. Windows have `model.window` tokens per side, as ours. In a stage
    smaller than that Hugging Face shrinks the window but not the table, and fails at the first step; such a stage gets
    a table of the right size here. The decoder predicts the whole image, and the loss is masked.
    """
    import torch
    from transformers import SwinConfig, SwinForMaskedImageModeling

    model = config.model
    side = _square(config, "hf_swin_simmim")
    stages = range(len(model.depths))
    require(
        all(model.widths[stage] == model.widths[0] * 2**stage for stage in stages),
        f"model.widths: hf_swin_simmim doubles the width at each stage, unlike {model.widths}",
    )
    require(
        len(set(model.mlp_ratios)) == 1,
        f"model.mlp_ratios: hf_swin_simmim has one ratio for all stages, unlike {model.mlp_ratios}",
    )
    require(not model.norm_pix_loss, "model.norm_pix_loss: hf_swin_simmim predicts plain pixels; set it to False")
    module: Any = SwinForMaskedImageModeling(
        SwinConfig(
            image_size=side,
            patch_size=model.patch,
            num_channels=model.channels,
            embed_dim=model.widths[0],
            depths=model.depths,
            num_heads=model.heads,
            window_size=model.window,
            mlp_ratio=model.mlp_ratios[0],
            drop_path_rate=0.0,
            encoder_stride=model.patch * 2 ** (len(model.depths) - 1),
        )
    )
    for stage in stages:
        window = min(model.window, side // model.patch // 2**stage)
        for block in module.swin.encoder.layers[stage].blocks:
            attention = block.attention
            attention.relative_position_bias = type(attention.relative_position_bias)(
                model.heads[stage], (window, window)
            )
    unit = model.patch * 2 ** (len(model.depths) - 1) // model.decoder_factor
    units, repeats = side // unit, unit // model.patch

    def loss(images: torch.Tensor) -> torch.Tensor:
        order = torch.rand(len(images), units**2, device=images.device).argsort(1)
        masked = (order >= units**2 // 4).view(-1, units, units)
        masked = masked.repeat_interleave(repeats, 1).repeat_interleave(repeats, 2)
        return module(images, bool_masked_pos=masked.flatten(1)).loss

    return Network(module, loss)


def _square(config: ConfigDict, name: str) -> int:
    height, width = config.image_size
    require(height == width, f"image_size: {name} needs square images, not {height} x {width}")
    return height


PEERS: dict[str, Callable[[ConfigDict], Network]] = {
    "torch_um_mae": torch_um_mae,
    "hf_vit_mae": hf_vit_mae,
    "hf_swin_simmim": hf_swin_simmim,
}
