"""Base class of all masked image models (SPEC 2, 6, 7): mask units, masks, and the target."""

import jax
import jax.numpy as jnp
from flax import nnx

from umae_jax.errors import require
from umae_jax.masking import Mask, sample_uniform_mask, visible_count
from umae_jax.models import kernels
from umae_jax.models.encoder import Encoder
from umae_jax.models.sizes import check_image_size
from umae_jax.patches import patchify
from umae_jax.random_masking import sample_random_mask


class MaskedImageModel(nnx.Module):
    """Samples a quarter of the mask units and predicts the others; sizes that do not fit raise a UserError.

    Args:
        encoder: any encoder that takes the masks.
        image_size: height and width in pixels.
        decoder_factor: mask units along the side of one encoder token (r of SPEC 6).
        sampling: "uniform" or "random".
        secondary_ratio: fraction of the sampled units that secondary masking hides.
        norm_pix_loss: predict each unit's pixels normalised by the unit's own mean and variance.
        compact: whether the encoder sees the compact grid or the whole image.
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
        patches = encoder.stride // encoder.patch
        message = (
            f"model.decoder_factor: {decoder_factor} does not divide {patches}, the patches along one output token"
        )
        require(decoder_factor > 0 and patches % decoder_factor == 0, f"{message}; choose a divisor of {patches}")
        self.unit = encoder.stride // decoder_factor
        # A compact image, half the side, must divide into output tokens; a whole image into output tokens and cells.
        multiple = 2 * encoder.stride if compact else max(encoder.stride, 2 * self.unit)
        check_image_size(image_size, multiple, "the patch, doubled by every merge, or two mask units")
        self.cells = (image_size[0] // (2 * self.unit), image_size[1] // (2 * self.unit))
        require(0 <= secondary_ratio < 1, f"model.secondary_ratio must lie in [0, 1), not {secondary_ratio}")
        message = f"model.secondary_ratio: {secondary_ratio} hides all {self.cells[0] * self.cells[1]} sampled units"
        require(visible_count(self.cells, secondary_ratio) > 0, f"{message}; lower it")
        grid_patch = 2 * encoder.patch if compact else encoder.patch
        encoder.check_grid((image_size[0] // grid_patch, image_size[1] // grid_patch), compact=compact)
        self.encoder = encoder
        self.decoder_factor = decoder_factor
        self.sampling = sampling
        self.secondary_ratio = secondary_ratio
        self.norm_pix_loss = norm_pix_loss

    def sample_mask(self, keys: jax.Array) -> Mask:
        """Draw a mask for each image from its key, [B]."""
        sample = sample_random_mask if self.sampling == "random" else sample_uniform_mask
        return sample(keys, keys.shape[0], self.cells, self.secondary_ratio)

    def __call__(self, images: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
        """Compute the loss and the prediction of a batch.

        Args:
            images: [B, H, W, C], normalised float32, or uint8, which is cheaper to select and reorder.
            mask: from `sample_mask`.

        Returns:
            The loss over the units that were not sampled, a float32 scalar, and their prediction, float32
            [B, 3, cell rows, cell columns, unit * unit * C], in the order of `Mask.masked_units`.
        """
        raise NotImplementedError

    def target(self, images: jax.Array, mask: Mask) -> jax.Array:
        """Return the target, of the prediction's shape: normalised pixels ordered (row, column, channel)."""
        target = self.encoder.normalize(self.masked_pixels(images, mask))
        if self.norm_pix_loss:
            mean = target.mean(axis=-1, keepdims=True)
            variance = target.var(axis=-1, keepdims=True, ddof=1)  # unbiased, as in the reference
            target = (target - mean) / jnp.sqrt(variance + 1e-6)
        return target

    def masked_pixels(self, images: jax.Array, mask: Mask) -> jax.Array:
        """Return the pixels of units not sampled: [B, H, W, C] -> [B, 3, cell rows, cell columns, unit * unit * C]."""
        return mask.masked_units(kernels.row_major(patchify(images, self.unit)))
