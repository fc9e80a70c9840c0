"""Train a detector, also of masks, on annotations in COCO's format.

    python -m umae_jax.detect --config detect_htcpp_swin_large --workdir DIR --config.init=CHECKPOINT \
        --config.data.source=coco:FOLDER --config.validation.source=coco:FOLDER

`init` is the directory of a run or a file of weights, as for `umae_jax.load_encoder`; or those of a detector, whose
heads are taken as well; without it, training starts from scratch. The same command again continues from the newest
whole checkpoint in DIR.
"""

from umae_jax import process

if __name__ == "__main__":
    process.prepare()
    from umae_jax.cli import run_training

    run_training("detect")
