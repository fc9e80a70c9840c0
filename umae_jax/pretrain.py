"""Pre-train by masked image modelling.

    python -m umae_jax.pretrain --config quickstart --workdir DIR [--config.KEY=VALUE ...]

The same command again continues from the newest whole checkpoint in DIR.
"""

from umae_jax.tasks.command import run_command

if __name__ == "__main__":
    run_command("pretrain")
