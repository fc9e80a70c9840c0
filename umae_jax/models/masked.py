"""What every masked image model has (SPEC 2, 6, 7): mask units, masks over them, and their pixels as the target."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from umae_jax.errors import require
from umae_jax.masking import Mask, sample_random_mask, sample_uniform_mask, visible_count
from umae_jax.models.encoder import Encoder, Normalize, already_normalized, check_image_size
from umae_jax.models.kernels.platforms import last_in_lanes
from umae_jax.patches import patchify

Sampler = Callable[[jax.Array, int, tuple[int, int], float], Mask]
SAMPLERS: dict[str, Sampler] = {"uniform": sample_uniform_mask, "random": sample_random_mask}


class MaskedImageModel(nnx.Module):
    """The part that the masked autoencoder and SimMIM share: a quarter of the units sampled, the others predicted.

    Args:
        encoder: any.
        image_size: height and width in pixels.
        decoder_factor: how many mask units lie along the side of one encoder token (r of SPEC 6).
        sampling: a key of SAMPLERS.
        secondary_ratio: the share of sampled units that secondary masking hides; 0 for none.
        norm_pix_loss: predict each unit's pixels normalised by the unit's own mean and variance.
        compact: whether the encoder sees the compact grid or the whole image.

    Raises:
        UserError: if the numbers do not fit together.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        image_size: tuple[int, int],
        decoder_factor: int,
        sampling: str,
        secondary_ratio: float,
        norm_pix_loss: bool,
        compact: bool,
    ) -> None:
        require(0 <= secondary_ratio < 1, f"model.secondary_ratio must lie in [0, 1), not {secondary_ratio}")
        most = encoder.stride // encoder.patch
        require(
            decoder_factor > 0 and most % decoder_factor == 0,
            f"model.decoder_factor: {decoder_factor} does not divide {most}, the patches along one output token; "
            f"choose {'1' if most == 1 else f'a divisor of {most}'}",
        )
        self.unit = encoder.stride // decoder_factor
        if compact:  # half the image must be whole output tokens
            check_image_size(image_size, 2 * encoder.stride, "twice the patch, doubled by every merge")
        else:
            multiple = max(encoder.stride, 2 * self.unit)
            check_image_size(image_size, multiple, "the patch, doubled by every merge, or two mask units")
        self.cells = (image_size[0] // (2 * self.unit), image_size[1] // (2 * self.unit))
        units = self.cells[0] * self.cells[1]
        require(
            visible_count(self.cells, secondary_ratio) > 0,
            f"model.secondary_ratio: {secondary_ratio} hides all {units} sampled units; lower it",
        )
        self.encoder = encoder
        self.decoder_factor = decoder_factor
        self.sampling = sampling
        self.secondary_ratio = secondary_ratio
        self.norm_pix_loss = norm_pix_loss

    def sample_mask(self, keys: jax.Array) -> Mask:
        """Draw a mask for each image from its key, [B]."""
        return SAMPLERS[self.sampling](keys, keys.shape[0], self.cells, self.secondary_ratio)

    def __call__(
        self, images: jax.Array, mask: Mask, normalize: Normalize = already_normalized
    ) -> tuple[jax.Array, jax.Array]:
        """Loss and prediction of a batch.

        Args:
            images: [B, H, W, C], float32 and normalised, or uint8.
            mask: as `sample_mask` draws it.
            normalize: uint8 pixels [..., n * C] to normalised float32. Pixels are picked and put in order before it is
                called, while each takes a byte.

        Returns:
            The loss, a float32 scalar, over the units that were not sampled; and the prediction of those units, float32
            [B, 3, cell rows, cell columns, unit * unit * C], in the order of the mask's `masked_units`.
        """
        raise NotImplementedError

    def target(self, images: jax.Array, mask: Mask, normalize: Normalize = already_normalized) -> jax.Array:
        """The pixels of the units that were not sampled, ordered (row, column, channel), shaped as the prediction."""
        target = normalize(self.masked_pixels(images, mask))
        if self.norm_pix_loss:
            mean = target.mean(axis=-1, keepdims=True)
            variance = target.var(axis=-1, keepdims=True, ddof=1)  # the reference's is the unbiased one
            target = (target - mean) / jnp.sqrt(variance + 1e-6)
        return target

    def masked_pixels(self, images: jax.Array, mask: Mask) -> jax.Array:
        """The units that were not sampled, as they are: [B, H, W, C] -> [B, 3, cell rows, cell columns, pixels]."""
        return mask.masked_units(last_in_lanes(patchify(images, self.unit)))
