"""Declare configuration keys: each has a default, a meaning and a check.

Encoders and methods are entries of `ENCODERS` and `METHODS`. The modules of this package add theirs when they are
imported, so that a new one is a new file; a method defined elsewhere adds its own entry.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict, config_dict

from umae_jax.errors import require, shorten

MAX_ITEMS = 8  # of a tuple: an encoder with more stages would need huge images


class Check(NamedTuple):
    """The values that a key accepts."""

    type: type  # Python type of the value
    wording: str  # describes the accepted values, after "must be"
    accepts: Callable[[Any], bool]  # returns whether a value other than None is accepted
    optional: bool = False  # whether None is accepted


def optional(check: Check) -> Check:
    """Accept the values of another check, and None."""
    return check._replace(wording=f"{check.wording}, or None", optional=True)


def integer(lower: int | None = None, upper: int | None = None) -> Check:
    """Accept integers from `lower` to `upper`, both included; None is no bound."""

    def accepts(value: Any) -> bool:  # noqa: ANN401
        integral = isinstance(value, int) and not isinstance(value, bool)
        return integral and (lower is None or value >= lower) and (upper is None or value <= upper)

    words = "an integer" + ("" if lower is None else f" from {lower}") + ("" if upper is None else f" to {upper}")
    return Check(int, words, accepts)


def number(interval: str = "(-inf, inf)") -> Check:
    """Accept numbers in an interval, written as in mathematics: "[0, 1)" includes 0 and excludes 1."""
    lower, upper = map(float, interval[1:-1].split(","))

    def accepts(value: Any) -> bool:  # noqa: ANN401
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        above = value >= lower if interval[0] == "[" else value > lower
        below = value <= upper if interval[-1] == "]" else value < upper
        return above and below  # NaN is neither

    return Check(float, "a number" if interval == "(-inf, inf)" else f"a number in {interval}", accepts)


def sequence(item: Check, example: tuple[Any, ...]) -> Check:
    """Accept tuples of up to MAX_ITEMS items that all pass a check."""

    def accepts(value: Any) -> bool:  # noqa: ANN401
        return isinstance(value, tuple) and 0 < len(value) <= MAX_ITEMS and all(map(item.accepts, value))

    return Check(tuple, f"a tuple of up to {MAX_ITEMS}, such as {example}, each item {item.wording}", accepts)


def choice(*names: str) -> Check:
    """Accept one of these names."""
    return Check(str, f"one of {', '.join(names)}", lambda value: value in names)


TEXT = Check(
    str,
    "a string, not empty and without null characters",
    lambda value: isinstance(value, str) and value != "" and "\0" not in value,
)
BOOLEAN = Check(bool, "True or False", lambda value: isinstance(value, bool))


SAME = object()  # stands for the default, which may be None


class Key(NamedTuple):
    """A key's default, its meaning in one phrase with the unit, and the accepted values."""

    default: Any
    meaning: str
    check: Check
    missing: Any = SAME  # value in a stored configuration that lacks the key; SAME: the default


Keys: TypeAlias = Mapping[str, Key]  # by dotted name, such as "optimizer.beta1"


class Encoder(NamedTuple):
    """An encoder's keys and preset sizes."""

    name: str  # title in the documentation
    keys: Keys  # keys that only configurations of this encoder have
    sizes: Mapping[str, Mapping[str, Any]]  # the values of `config.model` for each preset size, by its name
    image_side: int  # height and width of the paper's images, in pixels
    eval_crop: float = 1.0  # fraction of the shorter side that a classifier's central crop keeps
    decoder_factor: int = 2  # mask units along the side of an encoder token


class Method(NamedTuple):
    """A training method's keys and recipe."""

    summary: str  # one phrase for lists of methods
    task: str  # module whose class `Task` trains it
    keys: Keys  # keys that only configurations of this method have
    # Returns the values that replace defaults, by dotted key, given the names of the size and the encoder.
    recipe: Callable[[str, str], Mapping[str, Any]] = lambda size, encoder: {}
    encoders: tuple[str, ...] | None = None  # names of the encoders that it can train; None: all
    model: str = "umae_jax.models.build"  # module whose `build_model` builds its model from a configuration


ENCODERS: dict[str, Encoder] = {}
METHODS: dict[str, Method] = {}


def encoder_of(size: str) -> str:
    """Return the name of the encoder that has this preset size; raise a UserError if none has it."""
    sizes = {size: name for name, encoder in ENCODERS.items() for size in encoder.sizes}
    require(size in sizes, f"size: there is no model {shorten(size)}; choose {', '.join(sizes)}")
    return sizes[size]


def size_of(config: ConfigDict) -> str:
    """Return the name of the preset size that a configuration's model has, else "swin of other sizes" or the like."""
    model = config.model
    for name, values in ENCODERS[model.encoder].sizes.items():
        if all(model[key] == value for key, value in values.items()):
            return name
    return f"{model.encoder} of other sizes"


def methods_of(size: str) -> tuple[str, ...]:
    """Return the methods that can train a preset size."""
    encoder = encoder_of(size)
    return tuple(name for name, method in METHODS.items() if method.encoders is None or encoder in method.encoders)


def build(keys: Keys) -> ConfigDict:
    """Build a configuration of default values."""
    config = ConfigDict()
    for dotted_name, key in keys.items():
        section, _, name = dotted_name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        # A reference knows its type even where its value is None.
        reference = config_dict.FieldReference(key.default, field_type=key.check.type)
        (config[section] if section else config)[name] = reference
    return config


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return every value of a configuration by dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return values
