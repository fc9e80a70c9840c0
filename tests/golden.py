"""The golden files: the reference's numbers on small models, from the folder that UMAE_JAX_GOLDEN names."""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from umae_jax.config import default_config
from umae_jax.masking import RandomMask, UniformMask
from umae_jax.models.build import build_model
from umae_jax.weights import names

FILES = (
    *("swin_um_window8", "swin_um_window4_no_secondary", "pvt_um", "vit_random", "vit_um"),
    *("simmim_swin", "simmim_pvt", "swin_classifier", "pvt_classifier", "vit_classifier"),
)


def config_of(name):
    """The model of a golden file, as the README of the files describes it."""
    kinds = {"simmim": "simmim", "classifier": "classifier", "random": "mae", "um": "um_mae"}
    method = next(method for kind, method in kinds.items() if kind in name.split("_"))
    encoder = next(encoder for encoder in ("swin", "pvt", "vit") if encoder in name)
    config = default_config({"swin": "swin_tiny", "pvt": "pvt_small", "vit": "vit_base"}[encoder], method)
    config.dtype = "float32"
    config.image_size = (64, 64) if encoder == "vit" else (128, 128)
    model = config.model
    model.update(
        {
            "swin": {"widths": (16, 32, 64, 128), "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "position_width": 8},
            "pvt": {"widths": (16, 24, 40, 48), "depths": (1, 2, 1, 1), "heads": (1, 2, 5, 6)},
            "vit": {"widths": (32,), "depths": (2,), "heads": (4,), "patch": 8},
        }[encoder]
    )
    if method in ("um_mae", "mae"):
        model.decoder_width, model.decoder_heads = (24, 3) if encoder == "vit" else (32, 4)
        model.reference_order = encoder != "vit" and method == "um_mae"
    if method == "classifier":
        model.classes = 10
    if encoder == "swin":
        model.window = 16 if name == "swin_um_window8" else 8
    if name == "swin_um_window4_no_secondary":
        model.secondary_ratio, model.norm_pix_loss = 0.0, False
    return config


def path_of(name):
    """The path of one golden file; skips the test where the folder is not known."""
    folder = os.environ.get("UMAE_JAX_GOLDEN")
    if not folder:
        pytest.skip("UMAE_JAX_GOLDEN does not name the folder of golden files")
    return Path(folder) / f"{name}.npz"


def load(name):
    """The arrays of one golden file."""
    with np.load(path_of(name)) as archive:
        return dict(archive)


def part(numbers, kind):
    """The "param"eters or "grad"ients of a file, by the reference's names."""
    return {key.removeprefix(f"{kind}/"): value for key, value in numbers.items() if key.startswith(f"{kind}/")}


def model_of(name):
    """The model of a golden file with the file's parameters."""
    config = config_of(name)
    graph, params = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))), nnx.Param)[:2]
    return nnx.merge(graph, names.from_reference(config, params, part(load(name), "param"), name=name))


def mask_of(numbers, model):
    """A file's boolean masks over the unit grid as the mask that the model takes."""
    cells = model.cells
    hidden = numbers.get("secondary", np.zeros_like(numbers["mask"]))
    if model.sampling == "random":
        order = np.argsort(numbers["mask"], axis=1, kind="stable")
        hidden = np.take_along_axis(hidden, order, 1)[:, : cells[0] * cells[1]]
        order = jnp.asarray(order, jnp.int32).reshape(-1, 4, *cells)
        return RandomMask(order, jnp.asarray(hidden).reshape(-1, *cells))

    def by_cell(flags):
        flags = flags.reshape(-1, cells[0], 2, cells[1], 2).transpose(0, 1, 3, 2, 4)
        return flags.reshape(-1, *cells, 4)

    sampled = by_cell(~numbers["mask"])
    assert (sampled.sum(-1) == 1).all()
    return UniformMask(jnp.asarray(sampled.argmax(-1), jnp.int32), jnp.asarray((by_cell(hidden) & sampled).any(-1)))


class Errors(NamedTuple):
    """How far we are from a golden file: the loss relatively, outputs by the largest difference, gradients by norm."""

    loss: float
    latent: float | None  # the encoder's output; not in the classifiers' files
    output: float  # prediction of all units, or logits
    gradient: float  # the largest over all parameters
    zero_gradient: float  # the largest entry of gradients that are 0 but for rounding


@functools.cache
def errors(name):
    """Compute a golden file's numbers with its parameters."""
    numbers = load(name)
    model = model_of(name)
    images = jnp.asarray(numbers["images"])
    if "logits" in numbers:
        latent, outputs, expected, loss_function = None, *_classifier(model, images, numbers)
    else:
        latent, outputs, expected, loss_function = _masked(model, images, numbers)
    graph, params = nnx.split(model, nnx.Param)[:2]
    loss, gradients = jax.jit(jax.value_and_grad(lambda params: loss_function(nnx.merge(graph, params))))(params)
    # The table that carries parameters carries their gradients too: it only moves numbers.
    ours, theirs = names.to_reference(config_of(name), gradients), part(numbers, "grad")
    compared, zero = [], [0.0]
    for key in theirs:
        if key.endswith("posmlp.2.bias"):  # shifts whole softmax rows: its true gradient is 0
            zero.append(np.abs(ours[key]).max())
        else:
            compared.append(np.linalg.norm(ours[key] - theirs[key]) / np.linalg.norm(theirs[key]))
    assert len(compared) + len(zero) - 1 == len(jax.tree.leaves(params))
    return Errors(
        loss=float(np.abs(loss - numbers["loss"]) / numbers["loss"]),
        latent=None if latent is None else float(np.abs(latent - numbers["latent"]).max()),
        output=float(np.abs(outputs - expected).max()),
        gradient=float(max(compared)),
        zero_gradient=float(max(zero)),
    )


def _classifier(model, images, numbers):
    def loss(model):
        labels = jnp.asarray(numbers["labels"])
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    return np.asarray(jax.jit(lambda model: model(images))(model)), numbers["logits"], loss


def _masked(model, images, numbers):
    mask = mask_of(numbers, model)
    count = 4 * model.cells[0] * model.cells[1]
    encode = jax.jit(lambda model: model.encode(images, mask))
    if hasattr(model, "predict"):  # SimMIM: all units in the order of the grid
        latent = encode(model)
        outputs = np.asarray(model.predict(latent)).reshape(2, count, -1)
        latent = np.asarray(latent).reshape(numbers["latent"].shape)
        return latent, outputs, numbers["pred"], lambda model: model(images, mask)[0]

    features = encode(model)
    # The prediction of all units, the sampled ones too, which the loss never asks for.
    tokens = model.decoder_tokens(features, mask)
    for block in model.decoder_blocks:
        tokens = block(tokens)
    tokens = np.asarray(model.decoder_prediction(model.decoder_norm(tokens)))[:, -count:]
    sampled = tokens[:, : count // 4].reshape(2, *model.cells, -1)
    # The reference lists the others in row-major order of the full grid, we by their place in the mask's maps.
    whole = np.asarray(mask.assemble(sampled, model.decode(features, mask))).reshape(2, count, -1)
    latent = np.asarray(features.maps[-1])
    if features.class_token is not None:  # and a ViT's sampled ones too
        unit_map = np.asarray(mask.assemble(latent, jnp.zeros((1, 1, 1, 1, 1)))).reshape(2, count, -1)
        latent = np.concatenate([features.class_token, unit_map[~numbers["mask"]].reshape(2, count // 4, -1)], 1)
        sampled = whole[~numbers["mask"]]
    outputs = [part.reshape(2, -1, whole.shape[-1]) for part in (sampled, whole[numbers["mask"]])]
    latent = latent.reshape(numbers["latent"].shape)
    return latent, np.concatenate(outputs, 1), numbers["pred"], lambda model: model(images, mask)[0]


def main():
    """Print how far this implementation is from each golden file."""
    print("| file | loss (relative) | encoder output | prediction or logits | gradients (largest, of their norm) |")
    print("|---|---|---|---|---|")
    for name in FILES:
        cells = ("" if error is None else f"{error:.1e}" for error in errors(name)[:4])
        print(f"| `{name}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
