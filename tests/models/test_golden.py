"""Parity with the reference: outputs and gradients of every golden file."""

import pytest

from tests import golden


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request):
    return request.param


@pytest.mark.parametrize("name", golden.FILES)
def test_outputs(name, large):
    errors = golden.errors(name, large=large)
    assert errors.loss < 1e-5
    assert errors.latent is None or errors.latent < 1e-4
    assert errors.output < 1e-4


@pytest.mark.parametrize("name", golden.FILES)
def test_gradients_of_every_parameter(name, large):
    errors = golden.errors(name, large=large)
    assert errors.gradient_norm < 1e-3
    assert errors.gradient < 1e-3
    assert errors.zero_gradient < 1e-5
