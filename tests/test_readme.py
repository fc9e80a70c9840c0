"""What the README shows runs as it stands."""

import importlib.util
import re
from pathlib import Path

from tests import small
from tests.runs import store

ROOT = Path(__file__).parents[1]


def test_the_lines_about_features_run(tmp_path, monkeypatch, capsys):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 5
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    config = quickstart.get_config()
    store(tmp_path / "runs" / "quickstart", config, small.random_model(config)[1])
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert capsys.readouterr().out == "[(1, 128, 128, 48), (1, 64, 64, 96), (1, 32, 32, 192)]\n"


def test_every_configuration_is_named():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "configs").glob("*.py"):
        stem = path.stem.removesuffix("_simmim").removesuffix("_mae")
        assert f"configs/{stem}.py" in readme
        assert path.stem == stem or f"`{path.stem.removeprefix(stem)}.py`" in readme
