"""Images to patches and back. Channels come last."""

import jax


def patchify(x: jax.Array, side: int) -> jax.Array:
    """Cut into patches ordered (row, column, channel): [B, H, W, C] -> [B, H / side, W / side, side * side * C].

    `patchify` and a linear layer are a convolution of kernel size and stride `side`.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, side * side * channels)


def unpatchify(x: jax.Array, side: int) -> jax.Array:
    """Invert `patchify`: [B, h, w, side * side * C] -> [B, h * side, w * side, C]."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, side, side, features // (side * side))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * side, width * side, -1)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Upsample by rearranging channels (SPEC 6): [B, h, w, C * r * r] -> [B, h * r, w * r, C].

    Channel c * r * r + (i * r + j) moves to channel c at place (i, j): channel-major, unlike `unpatchify`.
    """
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, features // (factor * factor), factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * factor, width * factor, -1)
