"""From a configuration to a model. Nothing else knows which encoder stands behind which method."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from umae_jax.errors import require
from umae_jax.models import layers
from umae_jax.models.autoencoder import MaskedAutoencoder
from umae_jax.models.classifier import Classifier
from umae_jax.models.encoder import Encoder, Sizes, check_image_size
from umae_jax.models.masked import MaskedImageModel
from umae_jax.models.pvt import Pvt
from umae_jax.models.simmim import SimMIM
from umae_jax.models.swin import Swin
from umae_jax.models.vit import Vit


def build_encoder(config: ConfigDict, dtype: DTypeLike, rngs: nnx.Rngs, *, final_norm: bool | None = None) -> Encoder:
    """The encoder that a configuration describes, freshly initialised.

    A classifier's has learned positions, drops paths in training, and leaves the last norm to the classifier, unless
    `final_norm` says otherwise.

    Raises:
        UserError: if its numbers do not fit together.
    """
    model = config.model
    classifies = model.method == "classifier"
    numbers = {key: model[key] for key in ("channels", "patch", "widths", "depths", "heads", "mlp_ratios")}
    sizes = Sizes(**numbers, drop_path=model.drop_path if classifies else 0.0)
    final_norm = not classifies if final_norm is None else final_norm
    shared: dict[str, Any] = {"final_norm": final_norm, "dtype": dtype, "rngs": rngs}
    if model.encoder == "swin":
        return Swin(sizes, window=model.window, position_width=model.position_width, **shared)
    check_image_size(config.image_size, model.patch, "the patch")
    require(
        model.widths[0] % 4 == 0,
        f"model.widths: {model.widths[0]} is not a multiple of 4, which the position table needs",
    )
    shared |= {
        "grid": (config.image_size[0] // model.patch, config.image_size[1] // model.patch),
        "learned_positions": classifies,
    }
    return Vit(sizes, **shared) if model.encoder == "vit" else Pvt(sizes, sr_ratios=model.sr_ratios, **shared)


def build_model(config: ConfigDict, rngs: nnx.Rngs) -> MaskedImageModel | Classifier:
    """The model that a configuration describes, freshly initialised.

    Raises:
        UserError: if its numbers do not fit together.
    """
    built = _build(config, rngs)
    built.set_attributes(layers.Block, rematerialize=config.rematerialize, fused_attention=config.fused_attention)
    return built


def _build(config: ConfigDict, rngs: nnx.Rngs) -> MaskedImageModel | Classifier:
    model, dtype = config.model, jnp.dtype(config.dtype)
    require(
        model.method != "mae" or model.encoder == "vit",
        f"model.method: random sampling (mae) leaves no grid to {model.encoder}; choose um_mae, or a vit",
    )
    encoder = build_encoder(config, dtype, rngs)
    if model.method == "classifier":
        require(model.classes is not None, "model.classes: say how many classes there are")
        return Classifier(encoder, image_size=config.image_size, classes=model.classes, dtype=dtype, rngs=rngs)
    shared = {"image_size": config.image_size, "decoder_factor": model.decoder_factor, "dtype": dtype, "rngs": rngs}
    shared |= {"norm_pix_loss": model.norm_pix_loss}
    if model.method == "simmim":
        return SimMIM(encoder, **shared)
    return MaskedAutoencoder(
        encoder,
        sampling="random" if model.method == "mae" else "uniform",
        secondary_ratio=model.secondary_ratio,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
        reference_order=model.reference_order,
        **shared,
    )
