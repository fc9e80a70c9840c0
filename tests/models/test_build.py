"""Importing models."""

import subprocess
import sys


def test_building_models_imports_neither_pallas_nor_data_and_training():
    program = """
import sys
import umae_jax.models.build
above = ("umae_jax.data", "umae_jax.training", "jax.experimental.pallas")
loaded = [name for name in sys.modules if name.startswith(above)]
assert "umae_jax.models.kernels.pallas_tpu" not in sys.modules
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)
