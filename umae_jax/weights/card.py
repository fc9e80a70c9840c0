"""The model card that goes with exported weights."""

from ml_collections import ConfigDict

import umae_jax

OURS = "<!-- umae_jax wrote this card, and will write it anew; remove this line to keep your own. -->"
METHODS = {
    "um_mae": "UM-MAE (uniform masking, arXiv 2205.10063)",
    "mae": "MAE (random sampling)",
    "simmim": "SimMIM",
    "classifier": "supervised classification",
}

_LOAD_JAX = """```python
import umae_jax

encoder = umae_jax.load_encoder("{file}")
maps = encoder(images)  # uint8 [B, H, W, C]: the map of every stage, [B, H / stride, W / stride, width]
```"""

_LOAD_TORCH = """In PyTorch, with the one file `umae_backbone.py` beside this one, which needs torch alone:

```python
import torch
from umae_backbone import load_backbone

backbone = load_backbone("{file}")
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
maps = backbone((images - mean) / std)  # images [B, C, H, W] of any size, in [0, 1]: the map of every stage
```"""

_LOAD_TRANSFORMERS = """In PyTorch, with transformers:

```python
from transformers import {model}

model = {model}.from_pretrained("FOLDER")
```"""


def model_card(config: ConfigDict, *, file: str, layout: str, step: int, parameters: int) -> str:
    """A README.md for the file: what it is, how it was made, how to load it.

    Args:
        config: of the run.
        file: its name.
        layout: "reference", or one of `huggingface.LAYOUTS`.
        step: of the checkpoint.
        parameters: how many the file holds.
    """
    model, data = config.model, config.data
    rows = {
        "encoder": f"{model.encoder}, patch {model.patch}, widths {model.widths}, depths {model.depths}, "
        f"heads {model.heads}",
        "trained by": METHODS[model.method],
        "images": f"{config.image_size[0]} x {config.image_size[1]}, {model.channels} channels",
        "normalisation": f"mean {data.mean}, std {data.std}, of pixels in [0, 1]",
        "parameters in the file": f"{parameters:,}",
        "written by": f"umae_jax {umae_jax.__version__}",
    }
    if step:  # weights that came in from elsewhere begin at 0
        rows["training"] = f"{step} steps of {config.batch_size} images, from {data.source}"
    if model.method == "classifier":
        rows["classes"] = str(model.classes)
    if layout == "reference":
        loading = _LOAD_JAX.format(file=file)
        if model.encoder != "vit":
            loading += "\n\n" + _LOAD_TORCH.format(file=file)
        names = "The names are those of the PyTorch reference of UM-MAE"
        names += ", which loads the file strictly, decoder included." if model.method != "classifier" else "."
    else:
        architecture = {"vit_mae": "ViTMAEForPreTraining", "vit": "ViTModel"}[layout]
        loading = _LOAD_TRANSFORMERS.format(model=architecture) + "\n\n" + _LOAD_JAX.format(file=file)
        names = f"The names are those of `{architecture}`."
        if layout == "vit_mae" and model.get("secondary_ratio"):
            names += " The token of secondary masking, which that model does not know, is left out."
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

{names} The whole configuration is in the file's metadata, under `config`.

{OURS}
"""
