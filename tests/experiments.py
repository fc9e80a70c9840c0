"""Load the script of an experiment in configs/."""

import importlib.util
from contextlib import contextmanager

from absl import flags

from tests.commands import ROOT


@contextmanager
def load(folder):
    """Yield the script as a module; its flags vanish afterwards, as another script may define the same ones."""
    known = set(flags.FLAGS)
    path = ROOT / "configs" / folder / "experiment.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{folder}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
