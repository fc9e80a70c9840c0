"""Every key a configuration has, its default and its unit. The files in `configs/` start from here."""

import json
from typing import Any

import jax
from ml_collections import ConfigDict, config_dict

from umae_jax.data.on_device import IMAGENET_MEAN, IMAGENET_STD
from umae_jax.errors import UserError, listing, require
from umae_jax.files import AnyPath
from umae_jax.models import kernels, presets

CONFIG_FILE = "config.json"  # in a run's directory


def default_config(size: str = "swin_tiny", method: str = "um_mae") -> ConfigDict:
    """Training after SPEC 10 of a model of SPEC 11; every key of a configuration.

    The method "classifier" takes the recipe of fine-tuning, the others that of pre-training.

    Args:
        size, method: of `umae_jax.models.presets`; the first words of `python -m umae_jax.models`.

    Raises:
        UserError: if there is no such preset.
    """
    require(size in presets.SIZES, f"there is no model {size!r}; choose {', '.join(presets.SIZES)}")
    methods = presets.methods_of(size)
    require(method in methods, f"there is no method {method!r} for {size}; choose {', '.join(methods)}")
    config = ConfigDict()
    config.seed = 0
    config.init = config_dict.placeholder(str)  # fine-tuning: a run's directory or a file of weights; None: none
    config.image_size = (presets.image_side(size),) * 2  # height, width in pixels
    config.batch_size = 4096  # images a step, over all devices
    config.grad_accum_steps = 1  # parts that a batch is computed in, to save memory
    config.rematerialize = "none"  # to save memory: "pairs" computes attention and GELU twice, "blocks" every block
    # On TPUs, to save time and memory: attention is one kernel, which computes its softmax twice but keeps all pairs of
    # tokens in fast memory; PVT's attention to pooled tokens stays as it is. Off because nobody has timed it on a chip,
    # and the compiler's estimate does not see inside.
    config.fused_attention = False
    config.dtype = "bfloat16"  # of the linear layers' arithmetic; parameters, norms, softmax and loss are float32

    # How long to train: give one; steps win over examples, and examples over epochs.
    config.total_steps = config_dict.placeholder(int)
    config.total_examples = config_dict.placeholder(int)
    config.total_epochs = 200.0

    model = config.model = ConfigDict()
    model.method = "um_mae"  # or mae (random sampling, ViT), simmim, classifier
    model.encoder = "swin"  # or pvt, vit
    model.channels = 3
    model.patch = 4  # pixels
    model.widths = (96, 192, 384, 768)  # of each stage; a ViT is one stage
    model.depths = (2, 2, 6, 2)  # blocks
    model.heads = (3, 6, 12, 24)
    model.mlp_ratios = (4, 4, 4, 4)  # hidden width of a block's MLP over its width
    model.window = 16  # Swin: tokens on a side on a whole image; half of it, the paper's 8, on the compact grid
    model.position_width = 32  # Swin: hidden width of the position MLP
    model.sr_ratios = (8, 4, 2, 1)  # PVT: side of what is pooled for keys and values; half of it on the compact grid
    model.secondary_ratio = 0.25  # um_mae, mae: the share of sampled units that secondary masking hides
    model.decoder_factor = 2  # mask units along the side of an encoder token; the unit is 4 * 2**3 / 2 = 16 pixels
    model.decoder_width = 512  # um_mae, mae, like the two below
    model.decoder_depth = 2
    model.decoder_heads = 16
    model.norm_pix_loss = True  # predict pixels normalised by their unit's mean and variance
    model.reference_order = False  # um_mae of pyramids; True: the reference's decoder positions (SPEC 6)
    model.classes = config_dict.placeholder(int)  # classifier; None: as many as the training data has
    model.drop_path = 0.1  # classifier: rate in the last block, in training
    model.update(presets.settings(size, method))

    data = config.data = ConfigDict()
    data.source = "photos"  # photos, folder:PATH or tfds:NAME
    data.split = "train"  # of a TFDS data set
    data.data_dir = config_dict.placeholder(str)  # where TFDS data sets lie; TFDS's default if None
    data.area = 0.2  # the smallest share of an image that a random crop keeps
    data.mean = IMAGENET_MEAN
    data.std = IMAGENET_STD
    data.class_names = ()  # classifier: written by fine-tuning, from the training data
    data.threads = config_dict.placeholder(int)  # that read and decode, in each process or worker; None: by its cores
    data.workers = config_dict.placeholder(int)  # processes that read and decode; None: by the host's cores, 0: none

    # What accuracy is measured on, each image once, resized and cropped in the middle. Pre-training runs a kNN probe.
    validation = config.validation = ConfigDict()
    validation.source = config_dict.placeholder(str)  # like data.source, and in data.data_dir; None: no validation
    validation.split = "validation"  # of a TFDS data set
    validation.every_epochs = 1.0  # 0: never
    validation.crop = 1.0  # the share of the shorter side that the central crop keeps

    # Fine-tuning's augmentation beside crop and flip; 0 turns each off.
    augment = config.augment = ConfigDict()
    augment.operations = 0  # of RandAugment, on an image
    augment.magnitude = 9.0  # of RandAugment, 0 to 10
    augment.magnitude_std = 0.5
    augment.erase = 0.0  # probability that a rectangle is replaced by noise
    augment.mixup = 0.0  # of the beta distribution of the share of each of two images
    augment.cutmix = 0.0  # likewise of the area; where both are on, an image draws one of them
    augment.label_smoothing = 0.0

    # kNN and linear probes of frozen features.
    probe = config.probe = ConfigDict()
    probe.stage = -1  # whose map is averaged: 0 is the first, -1 the last
    probe.images = 50_000  # of the training data, at most
    probe.neighbors = 20
    probe.temperature = 0.07

    optimizer = config.optimizer = ConfigDict()
    optimizer.base_learning_rate = 1.5e-4  # for a batch of 256; scaled by batch_size / 256
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.weight_decay = 0.05  # not on 1-D parameters and position embeddings
    optimizer.final_learning_rate = 0.0  # at the end of the cosine, not scaled
    optimizer.layer_decay = 1.0  # classifier: the rate of a layer over that of the one after it
    optimizer.ema_decay = config_dict.placeholder(float)  # decay of the moving average of the parameters; None: none
    optimizer.clip_norm = config_dict.placeholder(float)  # of the global gradient; None for no clipping
    optimizer.warmup_steps = config_dict.placeholder(int)  # the warm-up, in the same units as the total
    optimizer.warmup_examples = config_dict.placeholder(int)
    optimizer.warmup_epochs = 10.0

    mesh = config.mesh = ConfigDict()
    mesh.fsdp = 1  # devices over which parameters and optimiser are sharded; the batch is over all

    config.log_every = 50  # steps
    config.picture_every = 5000  # steps; 0 for never
    config.pictures = 6  # images in a picture
    config.checkpoint_every = 1000  # steps
    config.checkpoint_keep = 3  # the newest so many are kept,
    config.checkpoint_keep_every = 50_000  # and one each so many steps for good; 0 for none
    config.stop_after_bad_steps = 10  # in a row, whose loss or gradient was not finite
    if method == "classifier":
        _fine_tune(config, size)
    return config.lock()


def _fine_tune(config: ConfigDict, size: str) -> None:
    """Change the recipe of pre-training into that of fine-tuning (SPEC 10)."""
    config.batch_size = 1024
    config.total_epochs = 100.0
    config.picture_every = 0
    config.data.area = 0.08
    config.validation.crop = 0.875 if config.image_size == (224, 224) else 1.0
    config.augment.update(operations=2, erase=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    config.optimizer.update(
        base_learning_rate=5e-4,
        beta2=0.999,
        final_learning_rate=1e-6,
        layer_decay=presets.LAYER_DECAY.get(size, 0.85),
        warmup_epochs=5.0,
    )


def resolve_steps(config: ConfigDict, key: str, examples_per_epoch: int, batch_size: int) -> int:
    """A duration in steps, given as KEY_steps, else KEY_examples, else KEY_epochs, such as `optimizer.warmup`.

    Raises:
        UserError: if none is given, or the one given is negative.
    """
    values = flat(config)
    steps, examples, epochs = (values[f"{key}_{unit}"] for unit in ("steps", "examples", "epochs"))
    if steps is None:
        if examples is None:
            require(epochs is not None, f"{key}_steps: set it, or {key}_examples or {key}_epochs")
            examples = epochs * examples_per_epoch
        steps = round(examples / batch_size)
    require(steps >= 0, f"{key}_steps: a duration cannot be negative, got {steps} steps")
    return steps


def steps_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """An interval in steps; 0 for never, else at least 1."""
    return max(1, round(epochs * images / batch_size)) if epochs else 0


MAX_SEED = 2**32 - 1

_WHOLE_FROM_1 = (
    *("batch_size", "grad_accum_steps", "log_every", "pictures", "checkpoint_every", "checkpoint_keep"),
    *("stop_after_bad_steps", "data.threads", "mesh.fsdp", "probe.images", "probe.neighbors"),
    *("model.channels", "model.patch", "model.window", "model.position_width"),
    *("model.decoder_factor", "model.decoder_width", "model.decoder_depth", "model.decoder_heads"),
)
_WHOLE_FROM_0 = ("picture_every", "checkpoint_keep_every", "data.workers", "augment.operations")
_OR_NONE = ("data.threads", "data.workers")
_SEQUENCES_FROM_1 = (
    *("image_size", "model.widths", "model.depths", "model.heads", "model.mlp_ratios", "model.sr_ratios"),
)
_ABOVE_0 = ("optimizer.base_learning_rate", "optimizer.clip_norm", "probe.temperature")
_FROM_0 = (
    *("optimizer.weight_decay", "optimizer.final_learning_rate", "validation.every_epochs"),
    *("augment.magnitude_std", "augment.mixup", "augment.cutmix"),
)
_FROM_0_BELOW_1 = (
    *("optimizer.beta1", "optimizer.beta2", "optimizer.ema_decay", "model.drop_path", "augment.label_smoothing"),
)
_ABOVE_0_TO_1 = ("data.area", "validation.crop", "optimizer.layer_decay")


_ABSENT = object()  # in `differences`, for a key that only one of the two has


def _is_whole(value: Any, least: int) -> bool:  # noqa: ANN401 - whatever the user wrote
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check(config: ConfigDict, devices: int | None = None) -> None:
    """Check what no model or source checks for itself, for so many devices, or those that are there.

    Raises:
        UserError: naming the key and what to write.
    """
    check_values(config)
    devices = jax.device_count() if devices is None else devices
    require(
        devices % config.mesh.fsdp == 0,
        f"mesh.fsdp: {config.mesh.fsdp} does not divide the {devices} devices; choose a divisor of {devices}",
    )
    parts = devices * config.grad_accum_steps
    what = f"{devices} devices" + (
        f" x {config.grad_accum_steps} accumulated parts" if config.grad_accum_steps > 1 else ""
    )
    require(
        config.batch_size % parts == 0,
        f"batch_size: {config.batch_size} does not divide among {what}; choose a multiple of {parts}, "
        f"such as {max(1, round(config.batch_size / parts)) * parts}",
    )


def check_values(config: ConfigDict) -> None:
    """Check every value by itself, whatever devices there are.

    Raises:
        UserError: naming the key and what to write.
    """
    missing = [key for key, (_, value) in differences(default_config(), config).items() if value is _ABSENT]
    require(not missing, f"{listing(missing)}: missing; start from umae_jax.config.default_config()")
    values = flat(config)
    for keys, least in ((_WHOLE_FROM_1, 1), (_WHOLE_FROM_0, 0)):
        for key in keys:
            right = _is_whole(values[key], least) or (key in _OR_NONE and values[key] is None)
            require(right, f"{key} must be a whole number from {least}, not {values[key]}")
    for key in _SEQUENCES_FROM_1:
        right = isinstance(values[key], tuple) and all(_is_whole(value, 1) for value in values[key])
        require(right, f"{key} must be whole numbers from 1, such as (2, 2), not {values[key]}")
    for key in _ABOVE_0:
        require(values[key] is None or values[key] > 0, f"{key} must be above 0, not {values[key]}")
    for key in _FROM_0:
        require(values[key] >= 0, f"{key} must be 0 or above, not {values[key]}")
    for key in _FROM_0_BELOW_1:
        require(values[key] is None or 0 <= values[key] < 1, f"{key} must lie in [0, 1), not {values[key]}")
    for key in _ABOVE_0_TO_1:
        require(0 < values[key] <= 1, f"{key} must lie in (0, 1], not {values[key]}")
    require(
        config.optimizer.layer_decay == 1 or config.model.method == "classifier",
        "optimizer.layer_decay is fine-tuning's; leave it at 1 in pre-training",
    )
    require(0 <= config.augment.erase <= 1, f"augment.erase must lie in [0, 1], not {config.augment.erase}")
    require(0 <= config.augment.magnitude <= 10, f"augment.magnitude goes from 0 to 10, not {config.augment.magnitude}")
    classes, stages = config.model.classes, len(config.model.depths)
    require(
        classes is None or _is_whole(classes, 2), f"model.classes must be a whole number from 2, or None, not {classes}"
    )
    require(
        -stages <= config.probe.stage < stages,
        f"probe.stage: there are {stages} stages, from 0 to {stages - 1}, or -1 for the last; not {config.probe.stage}",
    )
    require(_is_whole(config.seed, 0) and config.seed <= MAX_SEED, f"seed must lie in 0..{MAX_SEED}, not {config.seed}")
    require(len(config.image_size) == 2, f"image_size is height and width, such as (256, 256), not {config.image_size}")
    for key, known in (("method", presets.METHODS), ("encoder", presets.ENCODERS)):
        value = config.model[key]
        require(value in known, f"model.{key}: {value!r} is none of {', '.join(known)}")
    require(config.dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, not {config.dtype!r}")
    require(
        config.rematerialize in kernels.REMATERIALIZE,
        f"rematerialize must be one of {', '.join(kernels.REMATERIALIZE)}, not {config.rematerialize!r}",
    )
    require(
        isinstance(config.fused_attention, bool),
        f"fused_attention must be True or False, not {config.fused_attention!r}",
    )
    channels = config.model.channels
    require(channels in (1, 3), f"model.channels must be 3, or 1 for grayscale: image files hold no {channels}")
    for key in ("mean", "std"):
        numbers = all(isinstance(value, int | float) for value in config.data[key])
        require(numbers, f"data.{key} must be numbers, such as {IMAGENET_MEAN}, not {config.data[key]}")
        require(
            len(config.data[key]) == channels,
            f"data.{key} names {len(config.data[key])} channels, model.channels is {channels}; write one number each",
        )
    require(min(config.data.std) > 0, f"data.std must be above 0, not {config.data.std}")


def to_json(config: ConfigDict) -> str:
    """The resolved configuration as JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def read_config(path: AnyPath) -> ConfigDict:
    """The configuration that a run wrote into its directory.

    Raises:
        UserError: if it is no such file.
    """
    try:
        return from_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not a configuration that this program wrote ({error})") from None


def from_json(text: bytes | str) -> ConfigDict:
    """The inverse of `to_json`. What an earlier version did not write takes its default, unless it is of the model.

    Raises:
        ValueError: if it is no configuration, does not say all of the model and its images, or a value cannot be.
    """

    def fill(config: ConfigDict, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                fill(config[key], value)
            else:
                config[key] = tuple(value) if isinstance(value, list) else value

    config = default_config()
    try:
        values = json.loads(text)
        missing = [key for key in config.model if key not in values["model"]] + [
            key for key in ("image_size", "dtype") if key not in values
        ]
        if missing:
            raise ValueError(f"{listing(missing)} missing")
        fill(config, values)
    except (KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    check_values(config)
    return config


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every value of a configuration by its dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return values


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two configurations differ, each with its old and its new value."""
    before, after = flat(old), flat(new)
    both = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in sorted({*before, *after})}
    return {key: values for key, values in both.items() if values[0] != values[1]}
