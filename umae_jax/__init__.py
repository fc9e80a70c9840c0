"""UM-MAE: masked pre-training of pyramid vision transformers, in JAX."""
