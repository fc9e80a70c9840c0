"""The README and the pages of docs/: their Python runs, and the files, modules, flags and keys they name exist."""

import ast
import functools
import itertools
import re
import shlex

import pytest

import umae_jax
from tests import small
from tests.commands import ROOT
from tests.runs import store
from umae_jax.config import default_config, flat, load_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TREES = ("configs", "docs", "launch", "tests", "umae_jax")
FLAG = re.compile(r"--([a-z][a-z_0-9]*(?:-[a-z]+)?)")
OTHER_FLAGS = {"dry-run", "check", "strict", "file_format", "help"}  # of launch/ and of other programs
SECTIONS = ("augment", "data", "mesh", "model", "optimizer", "probe", "validation")


def commands(page):
    """Return the commands of a page: (module, arguments)."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"python -m (umae_jax[\w.]*)([^`\n]*)", text)
    return [(module, arguments.partition("#")[0].partition(" && ")[0]) for module, arguments in lines]


def source_of(module):
    """Return the file of a module, without importing it: commands define flags of the same name."""
    path = ROOT / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__main__.py", path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def imported(file):
    """Return the files of the modules of this package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("umae_jax"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {source for name in names if (source := source_of(name))}


def flags_of(files):
    """Return the names of the flags that files define: first arguments of DEFINE_... and of other names for it."""
    names = set()
    for text in (file.read_text() for file in files):
        if "DEFINE_" in text:
            calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.args)
            first = (call.args[0] for call in calls)
            names |= {node.value for node in first if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return names | {f"no{name}" for name in names}


@functools.cache
def keys():
    """Return every key of every configuration."""
    models = umae_jax.list_models().items()
    return {key for size, methods in models for method in methods for key in flat(default_config(size, method))}


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    config = load_config("quickstart")
    store(tmp_path / "runs" / "quickstart", config, small.random_model(config)[1])
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == "[(2, 32, 32, 48), (2, 16, 16, 96), (2, 8, 8, 192)]\n(2, 192)\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_on_a_page_compiles(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(code, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_paths_exist(page):
    paths = re.findall(rf"(?<![\w/.])(?:{'|'.join(TREES)})/[\w./]*\w", page.read_text())
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist_with_their_flags(page):
    for module, arguments in commands(page):
        file = source_of(module)
        assert file is not None, module
        direct = imported(file)
        shared = set().union(*(imported(path) for path in direct))
        unknown = set(FLAG.findall(arguments)) - flags_of({file} | direct | shared) - {"help"}
        assert not unknown, (module, unknown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_in_the_text_exist(page):
    known = flags_of([*(ROOT / "umae_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]) | OTHER_FLAGS
    spans = " ".join(re.findall(r"`(--[^`\n]+)`", page.read_text()))
    assert set(FLAG.findall(spans)) - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configuration_keys_exist(page):
    text = page.read_text()
    named = set(re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)?)", text))
    named |= set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)[`=]", text))
    assert named - keys() - {"data.prepare"} == set()  # a module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configurations_in_commands_exist(page):
    for _, arguments in commands(page):
        words = shlex.split(arguments.replace("[", "").replace("]", ""))
        for flag, value in itertools.pairwise(words):
            if flag in ("--config", "--against") and not value.isupper():
                name = value.partition(":")[0]
                assert (ROOT / name).is_file() or (ROOT / "configs" / f"{name}.py").is_file(), value
    tables = re.findall(r"`((?:pretrain|finetune)_[a-z_]+)`", page.read_text())
    assert [name for name in tables if not (ROOT / "configs" / f"{name}.py").is_file()] == []
