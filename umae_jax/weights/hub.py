"""Files beside exported weights on a model hub: the model card, and configurations for transformers."""

import json

from ml_collections import ConfigDict

from umae_jax.config import ENCODERS, METHODS
from umae_jax.models.autoencoder import DECODER_MLP_RATIO
from umae_jax.version import __version__

GENERATED = "<!-- umae_jax wrote this card"  # marks a card that may be overwritten
MARKER = f"{GENERATED} and overwrites it; remove this line to keep your own text. -->"
WRITER = "umae_jax"  # the key of a config.json that may be overwritten
ARCHITECTURES = {"vit_mae": "ViTMAEForPreTraining", "vit": "ViTModel"}  # of transformers, by layout

_LOAD_JAX = """```python
import umae_jax

encoder = umae_jax.load_encoder("{file}")
maps = encoder(images)  # uint8 [B, H, W, C] -> one map per stage, [B, H / stride, W / stride, width]
```"""

_LOAD_DETECTOR = """Train it on other annotations, with a configuration of the same sizes:

```sh
python -m umae_jax.detect --config CONFIG --workdir DIR --config.init={file} --config.data.source=coco:FOLDER
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
        step: training step of the checkpoint; 0 for imported weights.
        parameters: number of parameters in the file, without fixed position tables.
    """
    model, data = config.model, config.data
    detector = "pyramid_width" in model
    rows = {
        "encoder": ", ".join(
            [model.encoder, *(f"{key} {model[key]}" for key in ("patch", "widths", "depths", "heads"))]
        ),
        "trained by": f"{model.method}: {METHODS[model.method].summary}",
        "images": f"{config.image_size[0]} x {config.image_size[1]}, {model.channels} channels",
        "normalisation": f"mean {data.mean}, std {data.std}, for pixels in [0, 1]",
        "parameters": f"{parameters:,}",
        "written by": f"umae_jax {__version__}",
    }
    if step:
        rows["training"] = f"{step} steps of {config.batch_size} images from {data.source}"
    if "classes" in model:
        rows["classes"] = str(model.classes)
    loading = [_LOAD_JAX.format(file=file)]
    if layout in ARCHITECTURES:
        architecture = ARCHITECTURES[layout]
        loading.insert(0, _LOAD_TRANSFORMERS.format(model=architecture))
        names = f"Parameter names are those of `{architecture}`."
        if layout == "vit_mae" and model.secondary_ratio:
            names += " That model has no token for secondary masking, so the file leaves it out."
    else:
        if len(model.depths) > 1 and not detector:  # a pyramid
            loading.append(_LOAD_TORCH.format(file=file))
        names = "Parameter names are those of the PyTorch reference of UM-MAE"
        if detector:
            names = (
                "FPN, RPN and heads have the parameter names of mmdet. The encoder has those of the PyTorch reference"
            )
            names += " of UM-MAE, after `backbone.`; other layers of the backbone have names after `pyramid.`."
        else:
            names += ", which loads the file strictly, decoder included." if "classes" not in model else "."
    if detector:
        loading = [_LOAD_DETECTOR.format(file=file), f"Its encoder alone:\n\n{loading[0]}"]
    pipeline = "image-classification" if "classes" in model else "image-feature-extraction"
    if detector:
        pipeline = "image-segmentation" if model.masks else "object-detection"
    examples = "\n\n".join(loading)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: umae_jax
pipeline_tag: {pipeline}
tags:
- masked-image-modeling
- {model.encoder}
---

# {ENCODERS[model.encoder].name}, {model.method}

| | |
|---|---|
{table}

## Load it

{examples}

{names} The file's metadata holds the whole configuration under `config`.

{MARKER}
"""


def transformers_files(layout: str, config: ConfigDict) -> dict[str, bytes]:
    """Return the configurations for a ViT in a layout, a key of ARCHITECTURES, by file name."""
    model = config.model
    (width,), (depth,), (heads,), (mlp_ratio,) = model.widths, model.depths, model.heads, model.mlp_ratios
    image_height, image_width = config.image_size
    architecture = {
        "model_type": layout,
        "architectures": [ARCHITECTURES[layout]],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp_ratio * width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": image_height if image_height == image_width else [image_height, image_width],
        "patch_size": model.patch,
        "num_channels": model.channels,
        WRITER: __version__,
    }
    if layout == "vit_mae":
        architecture |= {
            "decoder_hidden_size": model.decoder_width,
            "decoder_num_hidden_layers": model.decoder_depth,
            "decoder_num_attention_heads": model.decoder_heads,
            "decoder_intermediate_size": DECODER_MLP_RATIO * model.decoder_width,
            "mask_ratio": 0.75,
            "norm_pix_loss": model.norm_pix_loss,
        }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_height, "width": image_width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.mean),
        "image_std": list(config.data.std),
    }
    files = {"config.json": architecture, "preprocessor_config.json": preprocessor}
    return {name: json.dumps(content, indent=2).encode() for name, content in files.items()}
