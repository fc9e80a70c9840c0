"""The plain ViT encoder (SPEC 5): one stage, a class token, attention among all tokens."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import require
from umae_jax.masking import Mask
from umae_jax.models import layers
from umae_jax.models.encoder import Encoder, Features
from umae_jax.models.positions_table import PositionTable
from umae_jax.models.sizes import Sizes


class Vit(Encoder):
    """ViT with sin-cos positions. Its tokens need no neighbours, so it takes random masks as well as uniform ones.

    `grid`, `learned_positions` and `dense` are arguments of `PositionTable`.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        grid: tuple[int, int],
        learned_positions: bool,
        dense: bool = False,
        final_norm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(sizes, patch_norm=None, final_norm=final_norm, dtype=dtype, rngs=rngs)
        require(len(self.depths) == 1, f"model.depths: a ViT has one stage, such as (12,), not {self.depths}")
        (stage,) = sizes.stages()
        self.class_token = layers.token(stage.width, rngs=rngs)
        self.positions = PositionTable(stage.width, grid, class_token=True, learned=learned_positions, dense=dense)
        self.blocks = nnx.List(
            layers.TransformerBlock(stage.width, stage.heads, stage.mlp_ratio, drop=drop, dtype=dtype, rngs=rngs)
            for drop in stage.drops
        )

    def __call__(self, tokens: jax.Array, mask: Mask | None = None, drop_keys: jax.Array | None = None) -> Features:
        """See `Encoder.__call__`."""
        batch, rows, columns, width = tokens.shape
        x = (tokens + self.positions(tokens, mask)).reshape(batch, rows * columns, width)
        class_token = self.class_token[...] + self.positions.class_token_position()
        class_token = jnp.broadcast_to(class_token.astype(x.dtype), (batch, 1, width))
        x = jnp.concatenate([class_token, x], axis=1)  # [B, 1 + N, C]
        with jax.named_scope("stage_1"):
            x = self.apply_stage(self._apply_blocks, x, drop_keys)
        if self.norm is not None:
            x = self.norm(x)
        return Features((x[:, 1:].reshape(batch, rows, columns, width),), x[:, :1])

    def _apply_blocks(self, x: jax.Array, drop_keys: jax.Array | None) -> jax.Array:
        for block in self.blocks:
            x = block(x, drop_keys=drop_keys)
        return x
