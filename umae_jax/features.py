"""Features of whole images from pre-trained weights, wherever they come from."""

import os

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from umae_jax.data.on_device import normalize
from umae_jax.errors import require
from umae_jax.files import locate
from umae_jax.models.build import build_encoder
from umae_jax.models.encoder import Encoder
from umae_jax.models.sizes import check_image_size
from umae_jax.training.runs import read_run
from umae_jax.weights.huggingface import weights_in
from umae_jax.weights.names import from_reference
from umae_jax.weights.recognize import read_model


@jax.jit
def _encode(module: Encoder, images: jax.Array) -> tuple[jax.Array, ...]:
    return module(module.embed(images)).maps


class PretrainedEncoder:
    """An encoder on whole images: call it.

    Attributes:
        module: the Flax module.
        config: of the model it was taken from.
        widths, strides: of each stage's map, in channels and in pixels.
        mean, std: by which it wants images normalised.
    """

    def __init__(self, module: Encoder, config: ConfigDict) -> None:
        self.module = module
        self.config = config
        self.widths = module.widths
        self.strides = tuple(module.patch * 2**stage for stage in range(len(module.widths)))
        self.mean, self.std = config.data.mean, config.data.std

    def __call__(self, images: ArrayLike) -> tuple[jax.Array, ...]:
        """The map of every stage, [B, H / strides[i], W / strides[i], widths[i]].

        The last one is normed if its weights include that norm, as those of pre-training do and those of a classifier
        do not; it is float32 then, the others have the encoder's dtype.

        Args:
            images: [B, H, W, C], of any size that the last stride divides; uint8 0..255, or floating point and then
                normalised already (by `mean` and `std`).

        Raises:
            UserError: if the images have another shape.
        """
        images = jnp.asarray(images)
        require(
            images.ndim == 4 and images.shape[0] > 0 and images.shape[-1] == self.module.channels,
            f"images must be [batch, height, width, {self.module.channels}], one at least, not {list(images.shape)}",
        )
        require(
            images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating),
            f"images must be uint8 from 0 to 255, or floating point and normalised, not {images.dtype}",
        )
        size = (images.shape[1], images.shape[2])
        check_image_size(size, self.strides[-1], "the last stride; resize or pad the images")
        if images.dtype == jnp.uint8:
            images = normalize(images, self.mean, self.std)
        return _encode(self.module, images.astype(jnp.float32))


def load_encoder(
    path: str | os.PathLike[str], *, window: int | None = None, dtype: str = "float32"
) -> PretrainedEncoder:
    """Load an encoder from a run's directory or a file of weights.

    Args:
        path: the directory of a run (pre-trained, fine-tuned or converted), or a `.safetensors`, `.pth` or `.npz`
            file in this program's, the reference's or, for a ViT, Hugging Face's names; or the folder that
            transformers saved one in.
        window: Swin: tokens on a window's side, if it shall be another than the model's. The position MLP is
            continuous, so that any even number will do.
        dtype: what the linear layers compute in, float32 or bfloat16.

    Raises:
        UserError: if there are no such weights.
    """
    require(dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, not {dtype!r}")
    require(window is None or isinstance(window, int), f"window must be a whole number of tokens, not {window!r}")
    config, params = read_encoder(path)
    if window is not None:
        require(config.model.encoder == "swin", f"window: a {config.model.encoder} has no windows; leave it out")
        config.model.window = window
    config.dtype = dtype
    graph, _ = _shapes(config, final_norm="norm" in params)
    return PretrainedEncoder(nnx.merge(graph, jax.tree.map(jnp.asarray, params)), config)


def read_encoder(path: str | os.PathLike[str], name: str = "path") -> tuple[ConfigDict, nnx.State]:
    """The parameters of an encoder, on the host, and the configuration of the model that it was part of.

    Args:
        path: as for `load_encoder`.
        name: of the key that it comes from.

    Raises:
        UserError: if there are no such weights.
    """
    place = weights_in(locate(path, name))
    require(place.exists(), f"there is no file or directory {place}")
    if place.is_dir():
        stored = read_run(place)
        return stored.config, jax.device_get(stored.params["encoder"])
    config, tensors = read_model(place, encoder_only=True)
    _, shapes = _shapes(config, final_norm="norm.weight" in tensors)
    params = from_reference(config, nnx.State({"encoder": shapes}), tensors, name=str(place), only="encoder.")
    return config, params["encoder"]


def _shapes(config: ConfigDict, *, final_norm: bool) -> tuple[nnx.GraphDef, nnx.State]:
    def build() -> Encoder:
        return build_encoder(config, jnp.dtype(config.dtype), nnx.Rngs(0), final_norm=final_norm)

    return nnx.split(nnx.eval_shape(build), nnx.Param)
