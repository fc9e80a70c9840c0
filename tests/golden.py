"""The golden numbers: outputs and gradients of the PyTorch reference for ten small models.

`golden_numbers/` holds them for parameters and images drawn by the rule of its README. A second set of files, with
parameters, images and whole gradients, is checked where UMAE_JAX_GOLDEN names their folder.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.rngs import ConstantRngs
from umae_jax.config import default_config
from umae_jax.masking import UniformMask
from umae_jax.models.build import build_model
from umae_jax.random_masking import RandomMask
from umae_jax.weights import names

FILES = (
    *("swin_um_window8", "swin_um_window4_no_secondary", "pvt_um", "vit_random", "vit_um"),
    *("simmim_swin", "simmim_pvt", "swin_classifier", "pvt_classifier", "vit_classifier"),
)
FOLDER = Path(__file__).parent / "golden_numbers"
SEEDS = dict(zip(FILES, range(301, 311), strict=True))


def config_of(name):
    """Return the configuration of a golden file's model."""
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


def load(name, *, large=False):
    """Return the numbers of a golden file, with its images [2, H, W, 3] and parameters ("param/NAME").

    Args:
        large: read the file from UMAE_JAX_GOLDEN, with "grad/NAME"; skips the test if that is not set.
    """
    folder = os.environ.get("UMAE_JAX_GOLDEN") if large else FOLDER
    if not folder:
        pytest.skip("UMAE_JAX_GOLDEN does not name the folder of large golden files")
    with np.load(Path(folder) / f"{name}.npz") as archive:
        numbers = dict(archive)
    return numbers if large else numbers | draw(name, numbers)


def draw(name, numbers):
    """Draw the images and parameters of a small golden file by the rule of its README."""
    side = 64 if "vit" in name else 128
    images = np.random.default_rng(SEEDS[name] + 1000).standard_normal((2, 3, side, side)).astype(np.float32)
    rng = np.random.default_rng(SEEDS[name])
    drawn = {"images": images.transpose(0, 2, 3, 1)}
    for parameter, shape in zip(numbers["param_names"], map(json.loads, numbers["param_shapes"]), strict=True):
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            scaled = np.float32(0.1) * values
            scaled = 1 + scaled if parameter.endswith("weight") else scaled
        elif "token" in parameter:
            scaled = np.float32(0.5) * values
        else:
            scaled = values / np.float32(np.sqrt(np.prod(shape[1:])))
        drawn[f"param/{parameter}"] = scaled
    return drawn


def write_state_dict(name, path):
    """Write the parameters of a golden file as a state dict that the reference would load; return the path."""
    np.savez(path, **{key: value for key, value in load(name).items() if key.startswith("param/")})
    return path


def part(numbers, kind):
    """Return the "param"eters or "grad"ients among numbers, by the reference's names."""
    return {key.removeprefix(f"{kind}/"): value for key, value in numbers.items() if key.startswith(f"{kind}/")}


def model_of(name, *, large=False):
    """Return the model of a golden file with the file's parameters."""
    config = config_of(name)
    graph, params = nnx.split(nnx.eval_shape(lambda: build_model(config, ConstantRngs())), nnx.Param)[:2]
    parameters = part(load(name, large=large), "param")
    return nnx.merge(graph, names.from_reference(config, params, parameters, name=name))


def mask_of(numbers, model):
    """Return a file's boolean masks over the unit grid as a mask of the model's kind."""
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
    """Differences from a golden file: relative for the loss, the maximum for outputs, by the norm for gradients."""

    loss: float
    latent: float | None  # the encoder's output; not in the classifiers' files
    output: float  # prediction of all units, or logits
    gradient_norm: float  # maximum over all parameters, relative
    gradient: float  # maximum over all parameters: projections (small files) or whole gradients, over the norm
    zero_gradient: float  # maximum entry of the gradients that are 0 but for rounding


@functools.cache
def errors(name, *, large=False):
    """Compute the numbers of a golden file and compare."""
    numbers = load(name, large=large)
    model = model_of(name, large=large)
    images = jnp.asarray(numbers["images"])
    if "logits" in numbers:
        latent, outputs, expected, loss_function = None, *_classifier(model, images, numbers)
    else:
        latent, outputs, expected, loss_function = _masked(model, images, numbers)
    if outputs.shape != expected.shape:
        outputs = outputs[..., ::4]  # the channels that small files hold
    graph, params = nnx.split(model, nnx.Param)[:2]
    loss, gradients = jax.jit(jax.value_and_grad(lambda params: loss_function(nnx.merge(graph, params))))(params)
    # The table that converts parameters converts their gradients too: it only moves numbers.
    gradients = names.to_reference(config_of(name), gradients)
    expected_gradients = part(numbers, "grad")
    parameters = list(expected_gradients) if large else list(numbers["param_names"])
    norm_errors, gradient_errors, zero = [], [], [0.0]
    for index, key in enumerate(parameters):
        gradient = gradients[key].astype(np.float64)
        if key.endswith("posmlp.2.bias"):  # shifts whole softmax rows: its true gradient is 0
            zero.append(np.abs(gradient).max())
            continue
        if large:
            norm = np.linalg.norm(expected_gradients[key])
            difference = np.linalg.norm(gradient - expected_gradients[key])
        else:
            directions = np.random.default_rng(list(key.encode())).standard_normal((2, *gradient.shape))
            norm = numbers["grad_norms"][index]
            projections = (gradient * directions).reshape(2, -1).sum(-1)
            difference = np.abs(projections - numbers["grad_projections"][index]).max()
        norm_errors.append(abs(np.linalg.norm(gradient) - norm) / norm)
        gradient_errors.append(difference / norm)
    assert len(parameters) == len(jax.tree.leaves(params))
    return Errors(
        loss=float(np.abs(loss - numbers["loss"]) / numbers["loss"]),
        latent=None if latent is None else float(np.abs(latent - numbers["latent"]).max()),
        output=float(np.abs(outputs - expected).max()),
        gradient_norm=float(max(norm_errors)),
        gradient=float(max(gradient_errors)),
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
    if hasattr(model, "predict"):  # SimMIM: all units in row-major order
        latent = encode(model)
        outputs = np.asarray(model.predict(latent)).reshape(2, count, -1)
        latent = np.asarray(latent).reshape(numbers["latent"].shape)
        return latent, outputs, numbers["pred"], lambda model: model(images, mask)[0]

    features = encode(model)
    # Predict all units, the sampled ones too, which the loss does not need.
    tokens = model.decoder_tokens(features, mask)
    for block in model.decoder_blocks:
        tokens = block(tokens)
    tokens = np.asarray(model.decoder_prediction(model.decoder_norm(tokens)))[:, -count:]
    sampled = tokens[:, : count // 4].reshape(2, *model.cells, -1)
    # The reference lists the other units in row-major order of the full grid, we by their place in the mask's maps.
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
    """Print a table of the differences from each golden file."""
    print("| file | loss (relative) | encoder output | prediction or logits | gradient norms | gradients |")
    print("|---|---|---|---|---|---|")
    for name in FILES:
        cells = ("" if error is None else f"{error:.1e}" for error in errors(name)[:5])
        print(f"| `{name}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
