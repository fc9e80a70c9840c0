"""Keys and recipes of masked pre-training (SPEC 10): UM-MAE, MAE and SimMIM."""

from typing import Any

from umae_jax.config.base import BOOLEAN, ENCODERS, METHODS, Key, Method, integer, number
from umae_jax.config.common import MAX_DEPTH, MAX_HEADS, MAX_WIDTH

DECODER_DEPTHS = {"swin_large": 8, "vit_large": 8, "vit_huge": 8}  # other sizes: 2

_FACTOR = Key(
    2, "mask units along the side of an encoder token; pyramids have units of 16 x 16 pixels", integer(1, 1024)
)
_NORM_PIX = "predict pixels normalised by the mean and variance of their unit"


def _autoencoder_keys(secondary_ratio: float) -> dict[str, Key]:
    return {
        "model.secondary_ratio": Key(
            secondary_ratio, "fraction of sampled units that secondary masking hides", number("[0, 1)")
        ),
        "model.decoder_factor": _FACTOR,
        "model.decoder_width": Key(512, "channels of the decoder", integer(1, MAX_WIDTH)),
        "model.decoder_depth": Key(
            2, "decoder blocks; 8 in `swin_large`, `vit_large` and `vit_huge`", integer(1, MAX_DEPTH)
        ),
        "model.decoder_heads": Key(16, "attention heads of the decoder", integer(1, MAX_HEADS)),
        "model.norm_pix_loss": Key(True, _NORM_PIX, BOOLEAN),
        "model.reference_order": Key(False, "pyramids: use the reference's decoder positions (SPEC 6)", BOOLEAN),
    }


def _simmim_recipe(size: str, encoder: str) -> dict[str, Any]:
    return {"model.decoder_factor": ENCODERS[encoder].decoder_factor}


def _autoencoder_recipe(size: str, encoder: str) -> dict[str, Any]:
    return {**_simmim_recipe(size, encoder), "model.decoder_depth": DECODER_DEPTHS.get(size, 2)}


METHODS["um_mae"] = Method(
    summary="uniform sampling, secondary masking, light decoder",
    task="umae_jax.tasks.pretraining",
    keys=_autoencoder_keys(secondary_ratio=0.25),
    recipe=_autoencoder_recipe,
)
METHODS["mae"] = Method(
    summary="random sampling, light decoder (ViT)",
    task="umae_jax.tasks.pretraining",
    keys=_autoencoder_keys(secondary_ratio=0.0),
    recipe=_autoencoder_recipe,
    encoders=("vit",),  # random sampling leaves no grid for a pyramid
)
METHODS["simmim"] = Method(
    summary="random masking of the whole image, one linear layer",
    task="umae_jax.tasks.pretraining",
    keys={"model.decoder_factor": _FACTOR, "model.norm_pix_loss": Key(False, _NORM_PIX, BOOLEAN)},
    recipe=_simmim_recipe,
)
