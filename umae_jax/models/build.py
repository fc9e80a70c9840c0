"""Build models from configurations. No other module knows the names of encoders and methods."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from umae_jax.errors import require
from umae_jax.models import kernels
from umae_jax.models.autoencoder import MaskedAutoencoder
from umae_jax.models.classifier import Classifier
from umae_jax.models.encoder import Encoder
from umae_jax.models.masked import MaskedImageModel
from umae_jax.models.pvt import Pvt
from umae_jax.models.pyramid import STRIDES, Pyramid
from umae_jax.models.simmim import SimMIM
from umae_jax.models.sizes import Sizes, check_image_size
from umae_jax.models.swin import Swin
from umae_jax.models.vit import Vit


def build_encoder(
    config: ConfigDict, dtype: DTypeLike, rngs: nnx.Rngs, *, final_norm: bool | None = None, dense: bool = False
) -> Encoder:
    """Build the encoder of a configuration, freshly initialised.

    If `model.drop_path` is a key, as in all methods but pre-training, the encoder has learned positions, drops paths in
    training, and by default no final norm. A UserError names sizes that do not fit together.

    Args:
        config: the configuration; in dense prediction, `image_size` is that of the largest images.
        dtype: dtype that linear layers compute in.
        rngs: keys of the parameters.
        final_norm: whether a layer norm follows the last stage; None: only in pre-training.
        dense: encode images of any size as the reference does for dense prediction (DET 1.2).
    """
    model = config.model
    fine_tuned = "drop_path" in model
    numbers = {key: model[key] for key in ("channels", "patch", "widths", "depths", "heads", "mlp_ratios")}
    drop_path = model.drop_path if fine_tuned else 0.0
    sizes = Sizes(**numbers, mean=config.data.mean, std=config.data.std, drop_path=drop_path)
    if final_norm is None:
        final_norm = not fine_tuned
    shared: dict[str, Any] = {"final_norm": final_norm, "dtype": dtype, "rngs": rngs}
    grid = (config.image_size[0] // model.patch, config.image_size[1] // model.patch)
    if model.encoder == "swin":
        shared["dense_grid"] = grid if dense else None
        return Swin(sizes, window=model.window, position_width=model.position_width, **shared)
    check_image_size(config.image_size, model.patch, "the patch")
    message = f"model.widths: {model.widths[0]} is not a multiple of 4, which the position table needs"
    require(model.widths[0] % 4 == 0, message)
    shared |= {"grid": grid, "learned_positions": fine_tuned, "dense": dense}
    return Vit(sizes, **shared) if model.encoder == "vit" else Pvt(sizes, sr_ratios=model.sr_ratios, **shared)


def build_model(config: ConfigDict, rngs: nnx.Rngs) -> MaskedImageModel | Classifier:
    """Build the model of a configuration, freshly initialised; a UserError names sizes that do not fit together."""
    model, dtype = config.model, jnp.dtype(config.dtype)
    message = f"model.method: random sampling (mae) leaves no grid for {model.encoder}; choose um_mae, or a vit"
    require(model.method != "mae" or model.encoder == "vit", message)
    encoder = build_encoder(config, dtype, rngs)
    shared: dict[str, Any] = {"image_size": config.image_size, "dtype": dtype, "rngs": rngs}
    if model.method == "classifier":
        require(model.classes is not None, "model.classes: write the number of classes")
        built: MaskedImageModel | Classifier = Classifier(encoder, classes=model.classes, **shared)
    elif model.method == "simmim":
        shared |= {key: model[key] for key in ("decoder_factor", "norm_pix_loss")}
        built = SimMIM(encoder, **shared)
    else:
        require("decoder_width" in model, f"model.method: {model.method} has no model here; its task builds it")
        keys = ("decoder_factor", "norm_pix_loss", "secondary_ratio", "reference_order")
        shared |= {key: model[key] for key in (*keys, "decoder_width", "decoder_depth", "decoder_heads")}
        built = MaskedAutoencoder(encoder, sampling="random" if model.method == "mae" else "uniform", **shared)
    _set_kernels(built, config)
    return built


def build_pyramid(config: ConfigDict, dtype: DTypeLike, rngs: nnx.Rngs) -> Pyramid:
    """Build the pyramid of a configuration for dense prediction, freshly initialised.

    `image_size` is that of the largest images. A UserError names sizes that do not fit together.
    """
    check_image_size(config.image_size, STRIDES[-1], "the largest stride")
    pyramid = Pyramid(
        build_encoder(config, dtype, rngs, final_norm=False, dense=True),
        output_width=config.model.get("output_width", None),
        global_block=config.model.get("global_block", False),
        rngs=rngs,
    )
    _set_kernels(pyramid, config)
    return pyramid


def _set_kernels(model: nnx.Module, config: ConfigDict) -> None:
    chosen = {"rematerialize": config.rematerialize, "fused_attention": config.fused_attention}
    model.set_attributes(kernels.Block, kernels.Stages, **chosen)
