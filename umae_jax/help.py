"""The answer to --help, and one sentence for every wrong flag. Does not import JAX."""

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from umae_jax.config import (
    all_keys,
    describe_bundled,
    explain_failure,
    explain_key,
    find_key,
    flat,
    keys_of,
    missing_key,
)
from umae_jax.config.common import SECTIONS

HELP_FLAGS = {"--help", "-help", "-h", "-?", "--helpshort"}
CLUSTER = "umae_jax.cluster_flags"
WIDTH = 120  # of lines, unless the terminal is narrower
_PLACEHOLDERS = {
    "string": " TEXT",
    "multi string": " TEXT",
    "int": " N",
    "multi int": " N",
    "float": " NUMBER",
    "configuration": " FILE_OR_NAME",
}


def own_flags() -> dict[str, flags.Flag]:
    """Return the flags that this package and the command define, by name, without overrides of the configuration."""
    return {
        flag.name: flag
        for module, module_flags in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith("umae_jax") or module == sys.argv[0]
        for flag in module_flags
        if "." not in flag.name
    }


def command_help(text: str) -> str:
    """Return the help of a command: `text` about it, its flags, and the bundled configurations if it takes one."""
    cluster = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(CLUSTER, [])}
    tables = {
        "Flags:": [_row(flag) for name, flag in own_flags().items() if name not in cluster],
        "Flags of several processes:": [_row(flag) for name, flag in own_flags().items() if name in cluster],
        "Configurations:": list(describe_bundled().items()) if "config" in flags.FLAGS else [],
    }
    return "\n\n".join([text.strip(), *(f"{title}\n{_table(rows)}" for title, rows in tables.items() if rows)])


def keys_help(config: ConfigDict) -> str:
    """Return the keys of a configuration by section, with their values and meanings."""
    values, keys = flat(config), keys_of(config)
    parts = [f"The keys of this configuration ({config.model.encoder}, {config.model.method}) and their values."]
    parts += ["--config.KEY=VALUE overrides one: --config.optimizer.clip_norm=1.0"]
    for section, title in SECTIONS.items():
        names = [name for name in keys if name.rpartition(".")[0] == section]
        rows = [(name, repr(values[name]), keys[name].meaning.replace("`", "")) for name in names]
        parts += [f"{title}:\n{_table(rows)}"] if rows else []
    return "\n\n".join(parts)


def _row(flag: flags.Flag) -> tuple[str, str]:
    """Return how a flag is written, and its help."""
    kind = flag.flag_type()
    if flag.boolean:
        written = f"--[no]{flag.name}"
    elif isinstance(flag, flags.EnumFlag):
        written = f"--{flag.name} {'|'.join(flag.parser.enum_values)}"
    else:
        written = f"--{flag.name}{_PLACEHOLDERS[kind]}"
    notes = ["may be repeated"] if kind.startswith("multi") else []
    notes += [f"default: {flag.default}"] if flag.default or type(flag.default) is int else []
    text = re.sub(r"^<.*?>: |;\s+repeat this option.*", "", flag.help.strip(), flags=re.DOTALL)  # absl's additions
    return written, text + (f" ({'; '.join(notes)})" if notes else "")


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Align columns, and wrap the last one."""
    width = min(WIDTH, max(80, shutil.get_terminal_size((WIDTH, 0)).columns))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines: list[str] = []
    for *cells, text in rows:
        start = "  " + "".join(f"{cell:{size}}  " for cell, size in zip(cells, widths, strict=True))
        lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start)) or [
            start.rstrip()
        ]
    return "\n".join(lines)


def explain_flag_error(error: Exception, argv: Sequence[str]) -> str:
    """Explain in one sentence why the flags of a command line cannot be parsed."""
    overrides = re.findall(r"^--?config\.([^=\s]+)", "\n".join(argv), re.MULTILINE)
    unrecognized = isinstance(error, flags.UnrecognizedFlagError)
    if isinstance(error, config_flags.FlagOrderError) or (unrecognized and overrides and "config" in flags.FLAGS):
        return f"--config.{overrides[0]} changes a configuration; write --config with a file or a name before it"
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"unknown flag --{error.flagname}{_nearest(error.flagname)}"
    if isinstance(error, flags.Error):
        override = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
        if override and (key := find_key(override[1])):
            return f"--config.{override[1]} must be {key.check.wording}, not {override[2]!r}"
        return str(error)
    # ml_collections names only the part of an overridden key that does not exist.
    part, known = missing_key(error), all_keys()
    for key in sorted(overrides, key=lambda key: key in known):
        if part in key.split("."):
            return explain_key(key, "--config.")
    return f"--config: {explain_failure(error)}"


def _nearest(name: str) -> str:
    """Return a question about the flag whose name is nearest, else where to find the names."""
    near = difflib.get_close_matches(name, own_flags(), n=1)
    return f"; did you mean --{near[0]}?" if near else "; --help lists the flags"
