"""Print every configuration key as Markdown: `python -m umae_jax.config > docs/configuration.md`."""

from umae_jax import cli, console
from umae_jax.config import ENCODERS, METHODS, default_config, flat
from umae_jax.config.base import Keys
from umae_jax.config.common import COMMON, SECTIONS

_INTRODUCTION = """# Configuration keys

`umae_jax.default_config(size, method)` returns a configuration with all keys of an encoder and a method. The files in
`configs/` change some of them, and the command line overrides any: `--config.optimizer.clip_norm=1.0`. A run writes its
resolved configuration to `DIR/config.json`. This page is generated: `python -m umae_jax.config`.

Sections are written as prefixes: `data.source` is `config.data.source`. A duration has three keys; if several
are set, steps take precedence over examples, and examples over epochs."""


def _table(keys: Keys) -> str:
    rows = (f"| `{name}` | `{key.default!r}` | {key.check.wording} | {key.meaning} |" for name, key in keys.items())
    return "\n".join(["| key | default | value | meaning |", "|---|---|---|---|", *rows])


def describe_keys() -> str:
    """Return all keys as Markdown, each with its default, accepted values and meaning."""
    parts = [_INTRODUCTION]
    sizeless = [key for key in COMMON if not key.startswith(("model.", "image_size"))]  # keys that no size sets
    for section, title in SECTIONS.items():
        keys = {name: key for name, key in COMMON.items() if name.rpartition(".")[0] == section}
        parts += [f"## {title}", _table(keys)] if keys else []
    for encoder in ENCODERS.values():
        sizes = ", ".join(f"`{size}`" for size in encoder.sizes)
        parts += [
            f"## Encoder {encoder.name}",
            f"Sizes: {sizes}, for images of {encoder.image_side} x {encoder.image_side} pixels.",
        ]
        parts += [_table(encoder.keys) if encoder.keys else "It has no further keys."]
    for name, method in METHODS.items():
        encoder = ENCODERS[method.encoders[0] if method.encoders else next(iter(ENCODERS))]
        size = next(iter(encoder.sizes))
        parts += [f"## Method `{name}`", f"{method.summary[0].upper()}{method.summary[1:]}."]
        values = flat(default_config(size, name))
        changes = [f"`{key}` is `{values[key]!r}`" for key in sizeless if values[key] != COMMON[key].default]
        parts += [f"Its defaults differ: {', '.join(changes)}."] if changes else []
        parts += [_table(method.keys)]
    return "\n\n".join(parts)


def main() -> None:
    """Print the page."""
    console.result(describe_keys())


if __name__ == "__main__":
    cli.run(main, compiles=False)
