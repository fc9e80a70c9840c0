import json

from tests import commands
from tests.images import write_folder


def test_the_loader_is_measured_beside_plain_pillow(tmp_path):
    folder = write_folder(tmp_path, 8, height=600, width=800)  # large enough that decoding counts
    arguments = ["--config", "tests/tiny.py", f"--config.data.source=folder:{folder}", "--images=256", "--rounds=2"]
    printed, _ = commands.run("benchmark", *arguments, "--json")
    result = json.loads(printed)
    assert result["loader"]["per_core"] > 0
    assert result["plain Pillow"]["per_core"] > 0
    # Grossly wrong accounting, such as work that the other did, would show.
    assert 0.1 < result["ratio"]["median"] < 4
    assert result["ratio"]["least"] <= result["ratio"]["median"] <= result["ratio"]["most"]
