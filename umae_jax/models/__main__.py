"""`python -m umae_jax.models`: see `umae_jax/model_table.py`."""

import runpy

runpy.run_module("umae_jax.model_table", run_name="__main__", alter_sys=True)
