"""Parity with the reference: every output and every gradient of every golden file."""

import pytest

from tests import golden


@pytest.mark.parametrize("name", golden.FILES)
def test_outputs(name):
    errors = golden.errors(name)
    assert errors.loss < 1e-5
    assert errors.latent is None or errors.latent < 1e-4
    assert errors.output < 1e-4


@pytest.mark.parametrize("name", golden.FILES)
def test_gradients_of_every_parameter(name):
    errors = golden.errors(name)
    assert errors.gradient < 2e-4
    assert errors.zero_gradient < 1e-6
