"""Rematerialisation changes memory and nothing else."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.small import build, random_case
from umae_jax.models.kernels import REMATERIALIZE


def loss_and_parameters(name, policy):
    model = build(name, rematerialize=policy)
    images, mask = random_case(model)
    graph, params = nnx.split(model, nnx.Param)
    return lambda params: nnx.merge(graph, params)(images, mask)[0], params


@pytest.mark.parametrize("name", ["swin_um_window8", "pvt_um", "vit_um"])
def test_each_policy_saves_less_than_the_one_before(name):
    saved = []
    for policy in REMATERIALIZE:
        loss, params = loss_and_parameters(name, policy)
        backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        saved.append(sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(backward)))
    assert saved[0] > 1.4 * saved[1] > 1.4 * 1.4 * saved[2]


def test_no_policy_changes_a_gradient():
    gradients = []
    for policy in REMATERIALIZE:
        loss, params = loss_and_parameters("vit_um", policy)
        gradients.append(jax.jit(jax.grad(loss))(params))
    for gradient in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, gradients[0])
