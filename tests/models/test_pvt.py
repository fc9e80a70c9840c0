"""PVT: pooling for keys and values, and initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import build, encode, random_case
from umae_jax.models.pvt import PooledAttention


@pytest.mark.parametrize(("grid", "reduction"), [((4, 6), 2), ((4, 8), 4), ((3, 5), 1)])
def test_every_token_attends_to_the_means_of_all_blocks(grid, reduction):
    attention = PooledAttention(8, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, *grid, 8))

    @jax.jit
    def by_pairs(attention, x):
        pooled = [
            x[:, row : row + reduction, column : column + reduction].mean((1, 2))
            for row in range(0, grid[0], reduction)
            for column in range(0, grid[1], reduction)
        ]
        keys_values = attention.kv(attention.norm(attention.reduce(jnp.stack(pooled, 1)))).reshape(2, -1, 2, 2, 4)
        q = attention.q(x).reshape(2, -1, 2, 4)
        weights = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, keys_values[:, :, 0]) / 2)
        weights = weights / weights.sum(-1, keepdims=True)
        return attention.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, keys_values[:, :, 1]).reshape(x.shape))

    ours = jax.jit(lambda attention, x: attention(x, reduction))(attention, x)
    np.testing.assert_allclose(ours, by_pairs(attention, x), atol=1e-5)


def test_reductions_are_halved_on_the_compact_grid_but_never_below_1():
    """Halved, 8 and 9 are the same; whole, 2 and 3 are not."""
    outputs = []
    for sr_ratios in ((8, 4, 2, 1), (9, 5, 3, 1), (4, 4, 2, 1)):
        model = build("pvt_um", sr_ratios=sr_ratios)
        outputs.append(np.asarray(encode(model, *random_case(model)).maps[-1]))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_initialisation_of_convolutions():
    """The standard deviation of each, SPEC 9."""
    model = build("pvt_um", widths=(32, 64, 80, 96), depths=(1, 1, 1, 1))
    stage = model.encoder.stages[1]
    attention = stage.blocks[0].attention
    expected = {
        "reduce": (attention.reduce.kernel, (2 / 64) ** 0.5),
        "merge": (stage.merge.kernel, (2 / (4 * 64)) ** 0.5),
        "patch": (model.encoder.patch_embed.kernel, (2 / (48 + 32)) ** 0.5),  # the others are Xavier uniform
        "keys and values": (attention.kv.kernel, (2 / (64 + 128)) ** 0.5),
    }
    for name, (parameter, deviation) in expected.items():
        tolerance = 5 / (2 * parameter.size) ** 0.5
        assert float(parameter[...].std()) == pytest.approx(deviation, rel=tolerance), name
    for layer in (attention.reduce, stage.merge, attention.kv):
        assert (np.asarray(layer.bias[...]) == 0).all()
