"""The distribution: a wheel runs without the checkout, and `import umae_jax` is light."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import umae_jax

ROOT = Path(__file__).parents[1]
OFFLINE = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True, **options)


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


@pytest.fixture
def checkout(tmp_path):
    """Return a copy of the checkout in a folder called umae_jax, as a clone is."""
    checkout = tmp_path / "umae_jax"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("umae_jax", "configs", "docs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    return checkout


def test_a_wheel_contains_configurations_and_docs_and_runs_without_the_checkout(tmp_path, checkout):
    target = tmp_path / "target"
    python("-m", "pip", "install", *OFFLINE, "--target", target, checkout, cwd=tmp_path)
    sources = {path.relative_to(ROOT) for path in (ROOT / "umae_jax").rglob("*") if path.suffix in (".py", ".json")}
    assert not [path for path in sources if not (target / path).is_file()]
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


def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(tmp_path, checkout):
    """There, Python finds the clone's folder first, as a namespace package of the same name."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    interpreter = environment / "bin" / "python"
    (packages,) = (environment / "lib").glob("*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    python("-m", "pip", "--python", interpreter, "install", *OFFLINE, "--editable", checkout, cwd=tmp_path)
    code = "import umae_jax, umae_jax.config as c; c.load_config('quickstart')\n"
    code += "print(umae_jax.__file__, umae_jax.load_encoder)"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [interpreter, "-c", code]
    output = subprocess.run(command, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True).stdout
    assert output.startswith(f"{checkout / 'umae_jax' / '__init__.py'} <function load_encoder")
