"""Golden numbers of the detection parts, computed by mmdet 3.3.0; arrays there have channels before rows."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "golden_numbers" / "detection"


def load(name):
    """Return the arrays of a golden file."""
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


def assert_close(name, actual, expected, tolerance=1e-4):
    """Print the largest difference over the largest expected number, and compare it with the tolerance."""
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"{name}: {error:.1e}")
    assert error <= tolerance


def assert_close_gradients(name, actual, expected, tolerance=1e-3):
    """Print the norm of the difference over the norm of the expected numbers, and compare it with the tolerance.

    An activation that rounding moves across the kink of a ReLU changes single numbers by more than the tolerance.
    """
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    print(f"{name}: {error:.1e}")
    assert error <= tolerance
