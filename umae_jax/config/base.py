"""Declare configuration keys: each has a default, a meaning and a check.

Encoders and methods are entries of `ENCODERS` and `METHODS`. The modules of this package add theirs when they are
imported, so that a new one is a new file; a method defined elsewhere adds its own entry.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict, config_dict

from umae_jax.errors import require


class Check(NamedTuple):
    """The values that a key accepts.

    Attributes:
        type: Python type of the value.
        wording: the accepted values, after "must be".
        accepts: whether a value that is not None is one of them.
        optional: whether None is one of them too.
    """

    type: type
    wording: str
    accepts: Callable[[Any], bool]
    optional: bool = False


def optional(check: Check) -> Check:
    """Accept None beside the values of another check."""
    return check._replace(wording=f"{check.wording}, or None", optional=True)


def integer(lower: int | None = None, upper: int | None = None) -> Check:
    """Accept integers from `lower` to `upper`, both included; None: no bound."""

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
    """Accept tuples whose items all pass a check."""

    def accepts(value: Any) -> bool:  # noqa: ANN401
        return isinstance(value, tuple) and bool(value) and all(map(item.accepts, value))

    return Check(tuple, f"a tuple such as {example}, each item {item.wording}", accepts)


def choice(*names: str) -> Check:
    """Accept one of these names."""
    return Check(str, f"one of {', '.join(names)}", lambda value: value in names)


TEXT = Check(str, "a string", lambda value: isinstance(value, str) and value != "")
BOOLEAN = Check(bool, "True or False", lambda value: isinstance(value, bool))


class Key(NamedTuple):
    """A key's default, its meaning in one phrase with the unit, and the accepted values."""

    default: Any
    meaning: str
    check: Check


# The keys of each section; "" is the top level, "model" the section config.model.
Sections: TypeAlias = Mapping[str, Mapping[str, Key]]


class Encoder(NamedTuple):
    """An encoder's keys and preset sizes.

    Attributes:
        name: in the documentation.
        keys: keys of `config.model` that only this encoder has.
        sizes: values of keys of `config.model`, by the name of the size.
        image_side: height and width of the paper's images, in pixels.
    """

    name: str
    keys: Mapping[str, Key]
    sizes: Mapping[str, Mapping[str, Any]]
    image_side: int


class Method(NamedTuple):
    """A training method's keys and recipe.

    Attributes:
        summary: one phrase for lists of methods.
        task: module of `umae_jax.tasks` that trains it.
        keys: keys that only this method has, by section.
        recipe: returns values by dotted key that replace defaults, given the size and the name of the encoder.
        encoders: names of the encoders that it can train; None: all.
    """

    summary: str
    task: str
    keys: Sections
    recipe: Callable[[str, str], Mapping[str, Any]] = lambda size, encoder: {}
    encoders: tuple[str, ...] | None = None


ENCODERS: dict[str, Encoder] = {}
METHODS: dict[str, Method] = {}


def encoder_of(size: str) -> str:
    """Return the name of the encoder that has this preset size.

    Raises:
        UserError: if no encoder has it.
    """
    sizes = {size: name for name, encoder in ENCODERS.items() for size in encoder.sizes}
    require(size in sizes, f"there is no model {size!r}; choose {', '.join(sizes)}")
    return sizes[size]


def methods_of(size: str) -> tuple[str, ...]:
    """Return the methods that can train a preset size."""
    encoder = encoder_of(size)
    return tuple(name for name, method in METHODS.items() if method.encoders is None or encoder in method.encoders)


def by_dotted_key(sections: Sections) -> dict[str, Key]:
    """Return keys by dotted name, such as "optimizer.beta1"."""
    return {
        f"{section}.{name}" if section else name: key
        for section, keys in sections.items()
        for name, key in keys.items()
    }


def build(sections: Sections) -> ConfigDict:
    """Build a configuration of default values."""
    config = ConfigDict()
    for section, keys in sections.items():
        part = config
        if section:
            part = config[section] = ConfigDict()
        for name, key in keys.items():
            value = key.default
            # A placeholder keeps its type where the value is None.
            part[name] = config_dict.FieldReference(value, field_type=key.check.type) if key.check.optional else value
    return config


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return every value of a configuration by dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return values
