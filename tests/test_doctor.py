from tests import commands
from tests.images import write_folder


def findings(output):
    return [line.split(None, 1) for line in output.splitlines() if line[:5] in ("ok   ", "WRONG")]


def test_where_all_is_well_it_says_what_is_there(tmp_path):
    write_folder(tmp_path / "images", 3)
    data = f"--config.data.source=folder:{tmp_path / 'images'}"
    output, _ = commands.run("doctor", "--config", "tests/tiny.py", data, "--workdir", tmp_path / "run")
    told = findings(output)
    assert [verdict for verdict, _ in told] == ["ok"] * 3
    assert told[0][1].startswith("software: python 3.")
    assert "8 x cpu" in told[1][1]
    assert f"3 images, the first {tmp_path / 'images'}" in told[1][1]
    assert told[2][1].startswith("a sum over 8 devices, 16 MiB each: ")
    assert not list((tmp_path / "run").iterdir())


def test_what_is_wrong_in_a_process_is_told_by_process_0(tmp_path):
    write_folder(tmp_path / "images", 3)
    arguments = ("--config", "tests/tiny.py", "--config.batch_size=12", "--config.data.source=folder:~/images")
    started = commands.start_together(
        "doctor",
        *arguments,
        *("--workdir", tmp_path / "run"),
        environments=[{"HOME": str(tmp_path)}, {"HOME": str(tmp_path / "other")}],
    )
    (output, errors), (others, _) = commands.end(started, [2, 2])
    wrong = [what.partition(": ")[2] for verdict, what in findings(output) if verdict == "WRONG"]
    batch = "batch_size: 12 does not divide among 8 devices; choose a multiple of 8, such as 16"
    assert wrong[:2] == [batch, "data.source: there is no folder ~/images; write the path of one that holds images"]
    assert wrong[2] == batch
    assert any(
        what == "2 processes met, with the same software, configuration and directory" for _, what in findings(output)
    )
    assert "error: not all is well" in errors
    assert findings(others) == []
