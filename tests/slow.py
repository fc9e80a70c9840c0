"""Mark tests that compile whole detectors, which takes minutes: they run only with UMAE_JAX_SLOW=1."""

import os

import pytest

slow = pytest.mark.skipif("UMAE_JAX_SLOW" not in os.environ, reason="compiles whole detectors; set UMAE_JAX_SLOW=1")
