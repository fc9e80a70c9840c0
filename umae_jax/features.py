"""Features of whole images, from the weights in a run's directory or a file."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from umae_jax.data.preprocess import ImageLike, as_list, crop_image
from umae_jax.errors import naming, require
from umae_jax.files import AnyPath, locate
from umae_jax.models.build import build_encoder
from umae_jax.models.encoder import Encoder
from umae_jax.models.sizes import check_image_size
from umae_jax.weights.encoder_file import encoder_of
from umae_jax.weights.exchange import read_model
from umae_jax.weights.huggingface import resolve_weights
from umae_jax.weights.names import from_reference
from umae_jax.weights.stored_run import read_run

__all__ = ["PretrainedEncoder", "load_encoder", "read_encoder"]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


@jax.jit
def _encode(module: Encoder, images: jax.Array) -> tuple[jax.Array, ...]:
    return module(module.embed(images)).maps


class PretrainedEncoder:
    """An encoder for whole images; call it with an array of them, or embed files.

    Attributes:
        module: the Flax module.
        config: configuration of the whole model.
        widths: channels of each stage's map.
        strides: pixels along a token's side in each stage's map.
        mean, std: normalisation of each channel, for pixels in [0, 1].
    """

    def __init__(self, module: Encoder, config: ConfigDict) -> None:
        self.module, self.config, self.widths = module, config, module.widths
        self.strides = tuple(module.patch * 2**stage for stage in range(len(module.widths)))
        self.mean, self.std = module.mean, module.std

    def __call__(self, images: ArrayLike) -> tuple[jax.Array, ...]:
        """Return the map of every stage, [B, H / strides[i], W / strides[i], widths[i]], in the encoder's dtype.

        The last map is normed, in float32, if the weights include the encoder's final norm: those of pre-training do,
        those of a classifier do not.

        Args:
            images: [B, H, W, C], uint8 in 0..255, or floating point and already normalised by `mean` and `std`; the
                last stride divides height and width.

        Raises:
            UserError: if images have another shape or dtype.
        """
        images = jnp.asarray(images)
        require(
            images.ndim == 4 and images.shape[0] > 0 and images.shape[-1] == self.module.channels,
            f"images must be [batch, height, width, {self.module.channels}] and not empty, not {list(images.shape)}",
        )
        require(
            images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating),
            f"images must be uint8 in 0..255, or floating point and normalised, not {images.dtype}",
        )
        size = (images.shape[1], images.shape[2])
        check_image_size(size, self.strides[-1], "the last stride; resize or pad the images")
        return _encode(self.module, images if images.dtype == jnp.uint8 else images.astype(jnp.float32))

    def preprocess(
        self, images: ImageLike | Iterable[ImageLike], size: int | tuple[int, int] | None = None
    ) -> np.ndarray:
        """Return the central crops that evaluation and probes see, resized: uint8 [B, H, W, C].

        Args:
            images: one image or several: paths of files, Pillow images, or arrays, uint8 [H, W] or [H, W, C] with
                1, 3 or 4 channels. They are turned as their Exif data says, and converted to the model's channels.
            size: height and width of the output, or one number for both; None: the model's image size. The crop keeps
                `config.validation.crop` of the shorter side.

        Raises:
            UserError: naming what is no image or cannot be read.
        """
        height, width = (size, size) if isinstance(size, int) else size or self.config.image_size
        channels, share = self.config.model.channels, self.config.validation.crop
        require(height > 0 and width > 0, f"size must be positive, not {size}")
        crops = [
            crop_image(image, (height, width), channels, share, self.config.data.max_pixels)
            for image in as_list(images)
        ]
        require(bool(crops), "images must not be empty")
        return np.stack(crops)

    def embed(
        self, images: jax.Array | ImageLike | Iterable[ImageLike], stage: int = -1, batch_size: int = 32
    ) -> np.ndarray:
        """Return one vector per image, the mean of a stage's map, which probes classify: float32 [B, widths[stage]].

        Args:
            images: an array [B, H, W, C] as for a call, of any size that the last stride divides; or what `preprocess`
                takes, at the model's image size.
            stage: 0 is the first, -1 the last.
            batch_size: images that are read and encoded together.

        Raises:
            UserError: if images, stage or batch size are invalid.
        """
        stages = len(self.widths)
        require(-stages <= stage < stages, f"stage must be {-stages} to {stages - 1}, not {stage}")
        require(batch_size > 0, f"batch_size must be positive, not {batch_size}")
        ready = getattr(images, "ndim", 0) == 4
        items: Any = images if ready else as_list(cast(ImageLike, images))
        count = len(items)
        means = []
        for start in range(0, max(1, count), batch_size):
            batch = items[start : start + batch_size]
            pixels = np.asarray(batch) if ready else self.preprocess(batch)
            missing = min(batch_size, count) - len(pixels)  # zero images: all batches have the shape of the first
            padded = np.pad(pixels, ((0, max(0, missing)), (0, 0), (0, 0), (0, 0)))
            mean = self(padded)[stage].astype(jnp.float32).mean((1, 2))
            means.append(jax.device_get(mean)[: len(pixels)])
        return np.concatenate(means)


def load_encoder(
    path: str | os.PathLike[str], *, window: int | None = None, dtype: str = "float32"
) -> PretrainedEncoder:
    """Load an encoder from a run's directory or a weight file.

    Args:
        path: the directory of a run (pre-trained, fine-tuned or converted); or a `.safetensors`, `.pth` or `.npz` file
            with the reference's parameter names or, for a ViT, those of transformers; or a folder that transformers
            saved.
        window: Swin: tokens along a window's side, an even number; None: the model's. Other windows need no training,
            because the position MLP is continuous.
        dtype: dtype in which linear layers compute, "float32" or "bfloat16".

    Raises:
        UserError: if there are no such weights, or an argument is invalid.
    """
    require(dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, not {dtype!r}")
    require(window is None or isinstance(window, int), f"window must be a whole number of tokens, not {window!r}")
    config, params, *_ = read_encoder(path)
    if window is not None:
        require("window" in config.model, f"window: a {config.model.encoder} has no windows; leave it out")
        config.model.window = window
    config.dtype = dtype
    graph, _ = _abstract_encoder(config, final_norm="norm" in params)
    return PretrainedEncoder(nnx.merge(graph, jax.tree.map(jnp.asarray, params)), config)


class PretrainedParams(NamedTuple):
    """The parameters of an encoder, and where they come from."""

    config: ConfigDict  # of the whole model
    params: nnx.State  # of its encoder, on the host
    path: AnyPath  # of the file or the run's directory
    step: int | None  # of the run's checkpoint; None for a file


def read_encoder(path: str | os.PathLike[str], name: str = "path") -> PretrainedParams:
    """Read the parameters of an encoder.

    Args:
        path: as for `load_encoder`.
        name: the flag or configuration key that gave the path, for error messages.

    Raises:
        UserError: if there are no such weights.
    """
    file = resolve_weights(locate(path, name))
    with naming(name):
        require(file.exists(), f"there is no file or directory {file}")
        if file.is_dir():
            run = read_run(file)
            return PretrainedParams(run.config, jax.device_get(encoder_of(run.params)), file, run.step)
        config, tensors, _ = read_model(file, encoder_only=True)
        _, shapes = _abstract_encoder(config, final_norm="norm.weight" in tensors)
        params = from_reference(config, nnx.State({"encoder": shapes}), tensors, name=str(file), only="encoder.")
        return PretrainedParams(config, params["encoder"], file, None)


def _abstract_encoder(config: ConfigDict, *, final_norm: bool) -> tuple[nnx.GraphDef, nnx.State]:
    def build() -> Encoder:
        return build_encoder(config, jnp.dtype(config.dtype), nnx.Rngs(0), final_norm=final_norm)

    return nnx.split(nnx.eval_shape(build), nnx.Param)
