"""The distribution: a wheel runs without the checkout, and `import umae_jax` is light."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import umae_jax

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True, **options)


def test_every_package_is_listed():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "umae_jax").rglob("*.py")}
    listed = set(SETTINGS["tool"]["setuptools"]["packages"])
    assert packages == {name for name in listed if not name.startswith(("umae_jax.configs", "umae_jax.docs"))}


def test_pyproject_and_the_package_have_the_same_version():
    assert SETTINGS["project"]["version"] == umae_jax.__version__


def test_importing_the_package_and_its_configurations_imports_no_jax():
    code = "import sys, umae_jax; umae_jax.list_models(); umae_jax.default_config()\n"
    code += "print([name for name in ('jax', 'flax', 'orbax', 'tensorflow') if name in sys.modules])"
    assert python("-c", code, cwd=ROOT).stdout == "[]\n"


def test_the_exported_names_are_listed():
    assert set(umae_jax.__all__) <= set(dir(umae_jax))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = umae_jax.no_such_name


def test_a_wheel_contains_configurations_and_docs_and_runs_without_the_checkout(tmp_path):
    checkout, target = tmp_path / "checkout", tmp_path / "target"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("umae_jax", "configs", "docs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    python("-m", "pip", "install", *options, "--target", target, checkout, cwd=tmp_path)
    assert (target / "umae_jax" / "docs" / "method.md").is_file()
    assert (target / "umae_jax" / "py.typed").is_file()
    shutil.rmtree(checkout)
    code = "import umae_jax, umae_jax.config as c; print(umae_jax.__file__, *c.bundled_configs())\n"
    code += "print(c.load_config('quickstart').image_size, c.load_config('cifar/pretrain:simmim').model.method)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    output = python("-c", code, cwd=tmp_path, env=environment).stdout
    names = [path.stem for path in (ROOT / "configs").glob("*.py")]
    assert output.splitlines()[0].split() == [str(target / "umae_jax" / "__init__.py"), *sorted(names)]
    assert output.splitlines()[1] == "(128, 128) simmim"
