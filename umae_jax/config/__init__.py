"""Configurations: every key with its default, meaning and check.

`default_config` starts one; the files of configs/ change what differs. `docs/configuration.md` lists all keys.
"""

import importlib
import json
import pkgutil
from typing import Any

from ml_collections import ConfigDict

from umae_jax.config.base import ENCODERS, METHODS, SAME, Key, build, encoder_of, flat, methods_of, size_of
from umae_jax.config.common import COMMON, IMAGENET_MEAN, IMAGENET_STD, MAX_SEED, check_common
from umae_jax.config.load import (
    REMOVED,
    RENAMED,
    all_keys,
    bundled_configs,
    describe_bundled,
    explain_failure,
    explain_key,
    find_key,
    load_config,
    missing_key,
)
from umae_jax.errors import UserError, listing, require, shorten
from umae_jax.files import AnyPath

# Import the modules that declare encoders and methods. Pre-training comes first, so its methods lead every list.
_modules = (module.name for module in pkgutil.iter_modules(__path__) if module.name != "__main__")
for _module in sorted(_modules, key=lambda name: name != "pretraining"):
    importlib.import_module(f"{__name__}.{_module}")

CONFIG_FILE = "config.json"  # in a run's directory


def default_config(size: str = "swin_tiny", method: str = "um_mae") -> ConfigDict:
    """Return the recipe of SPEC 10 for a model of SPEC 11, with every key of its configuration.

    Args:
        size: a preset, such as "swin_tiny", "pvt_small" or "vit_base"; `python -m umae_jax.models` lists them.
        method: "um_mae", "mae" (ViT), "simmim" or "classifier".

    Raises:
        UserError: if there is no such preset.
    """
    name, methods = encoder_of(size), methods_of(size)
    require(method in methods, f"method: there is no method {shorten(method)} for {size}; choose {', '.join(methods)}")
    encoder = ENCODERS[name]
    config = build(_keys(name, method))
    config.image_size = (encoder.image_side, encoder.image_side)
    config.model.update(method=method, encoder=name, **encoder.sizes[size])
    config.update_from_flattened_dict(METHODS[method].recipe(size, name))
    return config.lock()


def _keys(encoder: Any, method: Any) -> dict[str, Key]:  # noqa: ANN401
    """Return the keys of a configuration; raise a UserError if there is no such encoder or method."""
    for key, value, known in (("model.encoder", encoder, ENCODERS), ("model.method", method, METHODS)):
        require(value in known, f"{key} must be one of {', '.join(known)}, not {shorten(value)}")
    return {**COMMON, **ENCODERS[encoder].keys, **METHODS[method].keys}


def keys_of(config: ConfigDict) -> dict[str, Key]:
    """Return the keys of a configuration, by dotted name."""
    return _keys(config.model.encoder, config.model.method)


def check(config: ConfigDict, devices: int | None = None) -> None:
    """Check all values, and that the batch divides among the devices, by default all that JAX sees.

    A UserError names the key and a value to write.
    """
    check_values(config)
    if devices is None:
        import jax  # here, as reading a configuration needs no JAX

        devices = jax.device_count()
    fsdp, parts = config.mesh.fsdp, devices * config.grad_accum_steps
    message = f"mesh.fsdp: {fsdp} does not divide the {devices} devices; choose a divisor of {devices}"
    require(devices % fsdp == 0, message)
    accumulated = f" x {config.grad_accum_steps} micro-batches (grad_accum_steps)" if parts > devices else ""
    message = f"batch_size: {config.batch_size} does not divide among {devices} devices{accumulated}"
    nearest = max(1, round(config.batch_size / parts)) * parts
    require(config.batch_size % parts == 0, f"{message}; choose a multiple of {parts}, such as {nearest}")


def check_values(config: ConfigDict) -> None:
    """Check every key and value, for any number of devices; a UserError names the key and the accepted values."""
    values, keys = flat(config), keys_of(config)
    start = "start from umae_jax.default_config(size, method)"
    missing = [key for key in keys if key not in values]
    require(not missing, f"{listing(missing)}: missing; {start}")
    unknown = [key for key in values if key not in keys]
    require(not unknown, f"{listing(unknown)}: no key of this encoder and method; {start}")
    for key, value in values.items():
        accepted = keys[key].check
        valid = accepted.optional if value is None else accepted.accepts(value)
        require(valid, f"{key} must be {accepted.wording}, not {shorten(value)}")
    check_common(config)


def resolve_steps(config: ConfigDict, key: str, examples_per_epoch: int, batch_size: int) -> int:
    """Return a duration in steps from KEY_steps, else KEY_examples, else KEY_epochs; one of them must be set."""
    values = flat(config)
    steps, examples, epochs = (values[f"{key}_{unit}"] for unit in ("steps", "examples", "epochs"))
    if steps is not None:
        return int(steps)
    if examples is None:
        require(epochs is not None, f"{key}_steps: set it, or {key}_examples or {key}_epochs")
        examples = epochs * examples_per_epoch
    return round(examples / batch_size)


def steps_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """Return the steps in an interval of `epochs`: at least 1, but 0 for 0 epochs, which means never."""
    return max(1, round(epochs * images / batch_size)) if epochs else 0


def share_of_run(every: int | None, total_steps: int, parts: int) -> int:
    """Return an interval in steps: the given one, or if that is None so that a run has this many parts."""
    return max(1, round(total_steps / parts)) if every is None else every


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of every dotted key that differs; None if a configuration lacks the key."""
    before, after = flat(old), flat(new)
    both = {key: (before.get(key), after.get(key)) for key in sorted({*before, *after})}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def to_json(config: ConfigDict) -> str:
    """Return the resolved configuration as JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def read_config(path: AnyPath) -> ConfigDict:
    """Read the configuration that a run wrote into its directory; raise a UserError for any other file."""
    try:
        return from_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not a configuration that umae_jax wrote ({error})") from None


def from_json(text: bytes | str) -> ConfigDict:
    """Return the configuration that `to_json` wrote, in this version or an earlier one.

    Renamed keys take their new names. Keys of other encoders and methods are dropped: earlier versions wrote all of
    them. Missing keys take their defaults or `Key.missing`, except those of the model and its images.

    Raises:
        ValueError: if the text is not a configuration, lacks a key of the model or its images, or has a wrong value.
    """
    try:
        values = flat(ConfigDict(json.loads(text)))
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    values = {RENAMED.get(key, key): tuple(value) if type(value) is list else value for key, value in values.items()}
    keys = _keys(values.get("model.encoder"), values.get("model.method"))
    needed = [key for key in keys if key.startswith("model.") or key in ("image_size", "dtype")]
    missing = [key for key in needed if key not in values]
    require(not missing, f"{listing(missing)} missing")
    unknown = [key for key in values if key not in all_keys() and key not in REMOVED]
    require(not unknown, f"{listing(unknown)} unknown")
    values = {key: entry.missing for key, entry in keys.items() if entry.missing is not SAME} | values
    config = build(keys).lock()
    try:
        config.update_from_flattened_dict({key: value for key, value in values.items() if key in keys})
    except TypeError as error:
        raise ValueError(str(error)) from None
    check_values(config)
    return config


def old_class_names(text: bytes | str) -> tuple[str, ...]:
    """Return the class names in the JSON of a configuration that an earlier version wrote, else ()."""
    return tuple(json.loads(text).get("data", {}).get("class_names", ()))
