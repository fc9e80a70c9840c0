"""Keys that every configuration has: the run, data, validation, probes, optimiser, mesh and the encoder's sizes."""

from ml_collections import ConfigDict

from umae_jax.config.base import BOOLEAN, TEXT, Key, Keys, choice, integer, number, optional, sequence
from umae_jax.errors import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1], per channel
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SEED = 2**32 - 1
TRACKERS = ("none", "wandb", "mlflow")
MAX_BATCH, MAX_WIDTH, MAX_DEPTH, MAX_HEADS = 2**20, 2**16, 128, 1024
REMATERIALIZE = ("none", "pairs", "blocks", "stages")

# Upper bounds exclude typos: values that would take hours to build, more memory than any machine has, or overflow.
_MAYBE_COUNT = optional(integer(0, 10**12))
_EPOCHS = number("[0, 1e9]")
_MAYBE_EPOCHS = optional(_EPOCHS)
_POSITIVE = number("(0, inf)")
_DECAY = number("[0, 1)")

SECTIONS = {  # titles of the prefixes of keys
    "": "The run",
    "model": "Model",
    "data": "Training data",
    "augment": "Augmentation",
    "validation": "Validation",
    "probe": "Probes of frozen features",
    "optimizer": "Optimiser",
    "mesh": "Devices",
}

COMMON: Keys = {
    "seed": Key(0, "seed of every random draw", integer(0, MAX_SEED)),
    "init": Key(None, "fine-tuning: run directory or weights file to start from; None: random", optional(TEXT)),
    "image_size": Key((256, 256), "height and width in pixels", sequence(integer(1, 16384), (256, 256))),
    "batch_size": Key(4096, "images per step, over all devices", integer(1, MAX_BATCH)),
    "grad_accum_steps": Key(
        1, "micro-batches per batch, computed one after another to save memory", integer(1, MAX_BATCH)
    ),
    "rematerialize": Key(
        "none",
        "activations recomputed in the backward pass, to save memory: `pairs` for attention and GELU, `blocks` for "
        "whole blocks, `stages` for whole stages, block by block",
        choice(*REMATERIALIZE),
    ),
    # Off by default: not yet timed on a TPU, and the compiler's cost estimate does not cover Pallas kernels.
    "fused_attention": Key(False, "TPU: compute attention in one Pallas kernel (not PVT's)", BOOLEAN),
    "dtype": Key(
        "bfloat16",
        "dtype that linear layers compute in; parameters, norms, softmax and loss are float32",
        choice("float32", "bfloat16"),
    ),
    "total_steps": Key(None, "length of the training in steps", _MAYBE_COUNT),
    "total_examples": Key(None, "length of the training in images", _MAYBE_COUNT),
    "total_epochs": Key(200.0, "length of the training in epochs", _MAYBE_EPOCHS),
    "log_every": Key(50, "steps between lines of metrics", integer(1)),
    "tracker": Key(
        "none",
        "also log to Weights & Biases (`wandb`) or MLflow (`mlflow`), set up by their own environment variables",
        choice(*TRACKERS),
    ),
    "picture_every": Key(None, "steps between pictures of reconstructions; 0: never; None: 20 per run", _MAYBE_COUNT),
    "pictures": Key(6, "images per picture", integer(1, 256)),
    "checkpoint_every": Key(
        None, "steps between checkpoints; None: 20 per run, and at most 1,000 steps", optional(integer(1))
    ),
    "checkpoint_keep": Key(3, "number of newest checkpoints to keep", integer(1)),
    "checkpoint_keep_every": Key(50_000, "steps between checkpoints that are kept for good; 0: none", integer(0)),
    "stop_after_bad_steps": Key(
        10, "stop after this many steps in a row with a non-finite loss or gradient", integer(1)
    ),
    "model.method": Key("um_mae", "training method", TEXT),
    "model.encoder": Key("swin", "encoder", TEXT),
    "model.channels": Key(3, "image channels; 1 for grayscale", integer(1)),
    "model.patch": Key(4, "side of a patch in pixels", integer(1, 1024)),
    "model.widths": Key(
        (96, 192, 384, 768), "channels of each stage; a ViT has one stage", sequence(integer(1, MAX_WIDTH), (96, 192))
    ),
    "model.depths": Key((2, 2, 6, 2), "blocks of each stage", sequence(integer(1, MAX_DEPTH), (2, 2))),
    "model.heads": Key((3, 6, 12, 24), "attention heads of each stage", sequence(integer(1, MAX_HEADS), (3, 6))),
    "model.mlp_ratios": Key(
        (4, 4, 4, 4), "hidden width of the MLPs of each stage / its width", sequence(integer(1, 64), (4, 4))
    ),
    "data.source": Key("photos", "`photos`, `folder:PATH` or `tfds:NAME`", TEXT),
    "data.split": Key("train", "split of a TFDS data set", TEXT),
    "data.data_dir": Key(None, "directory of the TFDS data sets; None: TFDS's default", optional(TEXT)),
    "data.area": Key(0.2, "minimum fraction of an image's area that a random crop keeps", number("(0, 1]")),
    "data.max_pixels": Key(
        None,
        "maximum number of pixels of an image; sequential JPEGs may have more; None: Pillow's limit of 178,956,970",
        optional(integer(1, 10**12)),
    ),
    "data.mean": Key(
        IMAGENET_MEAN, "mean per channel, of pixels in [0, 1]", sequence(number("[-1000, 1000]"), IMAGENET_MEAN)
    ),
    "data.std": Key(IMAGENET_STD, "standard deviation per channel", sequence(number("[1e-6, 1000]"), IMAGENET_STD)),
    "data.threads": Key(
        None, "reading threads per process or worker; None: by the number of cores", optional(integer(1, 1024))
    ),
    "data.workers": Key(
        None, "reading processes per host; 0: none; None: by the number of cores", optional(integer(0, 1024))
    ),
    "validation.source": Key(
        None, "like `data.source`, for accuracy or a kNN probe; None: no validation", optional(TEXT)
    ),
    "validation.split": Key("validation", "split of a TFDS data set", TEXT),
    "validation.every_epochs": Key(1.0, "epochs between validations; 0: never", _EPOCHS),
    "validation.crop": Key(1.0, "fraction of the shorter side that the central crop keeps", number("(0, 1]")),
    "probe.stage": Key(-1, "stage whose averaged feature map is probed: 0 is the first, -1 the last", integer()),
    "probe.images": Key(50_000, "maximum number of training images", integer(1)),
    "probe.neighbors": Key(20, "neighbours of the kNN probe", integer(1)),
    "probe.temperature": Key(0.07, "temperature of the softmax that weights the neighbours", number("[1e-4, 1e4]")),
    "optimizer.base_learning_rate": Key(
        1.5e-4, "peak rate for 256 images; scaled by batch_size / 256", number("(0, 1000]")
    ),
    "optimizer.beta1": Key(0.9, "AdamW's decay of the first moment", _DECAY),
    "optimizer.beta2": Key(0.95, "AdamW's decay of the second moment", _DECAY),
    "optimizer.weight_decay": Key(0.05, "not applied to 1-D parameters and position embeddings", number("[0, 1000]")),
    "optimizer.final_learning_rate": Key(
        0.0, "rate at the end of the cosine schedule, not scaled", number("[0, 1000]")
    ),
    "optimizer.ema_decay": Key(None, "decay of the parameters' moving average; None: no average", optional(_DECAY)),
    "optimizer.clip_norm": Key(None, "maximum norm of the global gradient; None: no clipping", optional(_POSITIVE)),
    "optimizer.warmup_steps": Key(None, "length of the linear warm-up in steps", _MAYBE_COUNT),
    "optimizer.warmup_examples": Key(None, "length of the linear warm-up in images", _MAYBE_COUNT),
    "optimizer.warmup_epochs": Key(10.0, "length of the linear warm-up in epochs", _MAYBE_EPOCHS),
    "mesh.fsdp": Key(1, "devices that share one copy of the parameters and the optimiser state", integer(1)),
}


def check_common(config: ConfigDict) -> None:
    """Check that common values fit together; raise a UserError that names the key."""
    size = config.image_size
    require(len(size) == 2, f"image_size must be height and width, such as (256, 256), not {size}")
    channels, stages = config.model.channels, len(config.model.depths)
    require(channels in (1, 3), f"model.channels must be 3, or 1 for grayscale, not {channels}")
    for key in ("mean", "std"):
        count = len(config.data[key])
        message = f"data.{key} has {count} channels, model.channels is {channels}; write one number per channel"
        require(count == channels, message)
    require(
        -stages <= config.probe.stage < stages,
        f"probe.stage must be 0 to {stages - 1}, or -1 for the last of the {stages} stages, not {config.probe.stage}",
    )
