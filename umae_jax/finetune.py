"""Fine-tune a pre-trained encoder as a classifier.

    python -m umae_jax.finetune --config finetune_swin_tiny --workdir DIR --config.init=DIR_OR_FILE

`init` is the directory of a run or a file of weights, as for `umae_jax.load_encoder`; without it, training starts from
scratch. The same command again continues from the newest whole checkpoint in DIR.
"""

from umae_jax import process

if __name__ == "__main__":
    process.prepare()
    from umae_jax.cli import run_training

    run_training("finetune")
