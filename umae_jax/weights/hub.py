"""Files that accompany exported weights on a model hub: the model card, and the configuration for transformers."""

from typing import Any

from ml_collections import ConfigDict

import umae_jax
from umae_jax.models.autoencoder import DECODER_MLP_RATIO

GENERATED = "<!-- umae_jax wrote this card"  # marks a card that may be overwritten
MARKER = f"{GENERATED} and overwrites it; remove this line to keep your own text. -->"
WRITER = "umae_jax"  # the key of a config.json that may be overwritten
ARCHITECTURES = {"vit_mae": "ViTMAEForPreTraining", "vit": "ViTModel"}  # of transformers, by layout
METHODS = {
    "um_mae": "UM-MAE (uniform masking, arXiv 2205.10063)",
    "mae": "MAE (random sampling)",
    "simmim": "SimMIM",
    "classifier": "supervised classification",
}

_LOAD_JAX = """```python
import umae_jax

encoder = umae_jax.load_encoder("{file}")
maps = encoder(images)  # uint8 [B, H, W, C] -> one map per stage, [B, H / stride, W / stride, width]
```"""

_LOAD_TORCH = """In PyTorch, with `umae_backbone.py` from this folder, which needs only torch:

```python
import torch
from umae_backbone import load_backbone

backbone = load_backbone("{file}")
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
maps = backbone((images - mean) / std)  # images [B, C, H, W] in [0, 1], any size -> one map per stage
```"""

_LOAD_TRANSFORMERS = """In PyTorch, with transformers:

```python
from transformers import {model}

model = {model}.from_pretrained("FOLDER")
```"""


def model_card(config: ConfigDict, *, file: str, layout: str, step: int, parameters: int) -> str:
    """Return the README.md of a weight file: the model, its training, and code that loads it.

    Args:
        config: the run's configuration.
        file: name of the weight file.
        layout: "reference", or a key of ARCHITECTURES.
        step: training step of the checkpoint; 0 for weights imported from elsewhere.
        parameters: number of values in the file.
    """
    model, data = config.model, config.data
    rows = {
        "encoder": f"{model.encoder}, patch {model.patch}, widths {model.widths}, depths {model.depths}, "
        f"heads {model.heads}",
        "trained by": METHODS[model.method],
        "images": f"{config.image_size[0]} x {config.image_size[1]}, {model.channels} channels",
        "normalisation": f"mean {data.mean}, std {data.std}, for pixels in [0, 1]",
        "parameters in the file": f"{parameters:,}",
        "written by": f"umae_jax {umae_jax.__version__}",
    }
    if step:
        rows["training"] = f"{step} steps of {config.batch_size} images from {data.source}"
    if model.method == "classifier":
        rows["classes"] = str(model.classes)
    if layout in ARCHITECTURES:
        architecture = ARCHITECTURES[layout]
        loading = _LOAD_TRANSFORMERS.format(model=architecture) + "\n\n" + _LOAD_JAX.format(file=file)
        names = f"Parameter names are those of `{architecture}`."
        if layout == "vit_mae" and model.secondary_ratio:
            names += " That model has no token for secondary masking, so the file leaves it out."
    else:
        loading = _LOAD_JAX.format(file=file)
        if model.encoder != "vit":
            loading += "\n\n" + _LOAD_TORCH.format(file=file)
        names = "Parameter names are those of the PyTorch reference of UM-MAE"
        names += ", which loads the file strictly, decoder included." if model.method != "classifier" else "."
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: umae_jax
pipeline_tag: {"image-classification" if model.method == "classifier" else "image-feature-extraction"}
tags:
- masked-image-modeling
- {model.encoder}
---

# {model.encoder.upper() if model.encoder != "swin" else "Swin"}, {METHODS[model.method]}

| | |
|---|---|
{table}

## Load it

{loading}

{names} The file's metadata holds the whole configuration under `config`.

{MARKER}
"""


def transformers_config(layout: str, config: ConfigDict) -> dict[str, Any]:
    """Return the config.json for a ViT in a layout, a key of ARCHITECTURES."""
    model = config.model
    (width,), (depth,), (heads,), (mlp_ratio,) = model.widths, model.depths, model.heads, model.mlp_ratios
    height, width_in_pixels = config.image_size
    entries = {
        "model_type": layout,
        "architectures": [ARCHITECTURES[layout]],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp_ratio * width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": height if height == width_in_pixels else [height, width_in_pixels],
        "patch_size": model.patch,
        "num_channels": model.channels,
        WRITER: umae_jax.__version__,
    }
    if layout == "vit_mae":
        entries |= {
            "decoder_hidden_size": model.decoder_width,
            "decoder_num_hidden_layers": model.decoder_depth,
            "decoder_num_attention_heads": model.decoder_heads,
            "decoder_intermediate_size": DECODER_MLP_RATIO * model.decoder_width,
            "mask_ratio": 0.75,
            "norm_pix_loss": model.norm_pix_loss,
        }
    return entries


def preprocessor_config(config: ConfigDict) -> dict[str, Any]:
    """Return the preprocessor_config.json: resize, scale to [0, 1], normalise."""
    height, width = config.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.mean),
        "image_std": list(config.data.std),
    }
