"""Load configurations from Python files: a user's, or one of those that come with the package."""

import importlib.util
import os
from pathlib import Path

from ml_collections import ConfigDict

from umae_jax.config.explain import explain_failure
from umae_jax.errors import UserError, require

_PACKAGE = Path(__file__).parents[1]
# A wheel holds configs/ inside the package; a checkout holds it beside the package.
BUNDLED = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"


def bundled_configs() -> tuple[str, ...]:
    """Return the names of the bundled configurations."""
    return tuple(sorted(path.stem for path in BUNDLED.glob("*.py")))


def load_config(source: ConfigDict | str | os.PathLike[str]) -> ConfigDict:
    """Return a configuration.

    Args:
        source: a configuration, which is returned as it is; the path of a Python file whose `get_config()` returns
            one; or the name of a bundled file, such as "quickstart". "PATH:ARGUMENT" calls `get_config(ARGUMENT)`.

    Raises:
        UserError: if there is no such file or its `get_config()` fails.
    """
    if isinstance(source, ConfigDict):
        return source
    path, colon, argument = os.fspath(source).partition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        file = BUNDLED / f"{path}.py"
    require(
        file.is_file(),
        f"there is no file {path} and no bundled configuration of that name; bundled are "
        f"{', '.join(bundled_configs())}",
    )
    spec = importlib.util.spec_from_file_location("umae_jax_config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; write one such as configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code
        raise UserError(f"{path}: {explain_failure(error)}") from error
    require(hasattr(module, "get_config"), f"{path} must define get_config(); see configs/quickstart.py")
    try:
        config = module.get_config(*([argument] if colon else []))
    except Exception as error:  # user code
        raise UserError(f"{path}: {explain_failure(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return a changed default_config(), not {config!r}")
    return config.lock()
