"""Pre-train by masked image modelling.

    python -m umae_jax.pretrain --config quickstart --workdir DIR [--config.KEY=VALUE ...]

The same command again continues from the newest whole checkpoint in DIR.
"""

from umae_jax import process

if __name__ == "__main__":
    process.prepare()
    from umae_jax.cli import run_training

    run_training("pretrain")
