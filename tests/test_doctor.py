from tests import commands
from tests.images import write_folder


def findings(output):
    return [line.split(None, 1) for line in output.splitlines() if line[:5] in ("ok   ", "WRONG")]


def test_a_page_without_faults(tmp_path):
    write_folder(tmp_path / "images", 3)
    data = f"--config.data.source=folder:{tmp_path / 'images'}"
    output, _ = commands.run("doctor", "--config", "tests/tiny.py", data, "--workdir", tmp_path / "run")
    (software, process, total) = findings(output)
    assert [verdict for verdict, _ in (software, process, total)] == ["ok"] * 3
    assert software[1].startswith("software: python 3.")
    assert "8 x cpu" in process[1]
    assert f"3 images, the first {tmp_path / 'images'}" in process[1]
    assert total[1].startswith("sum over 8 devices, 16 MiB each: ")
    assert not list((tmp_path / "run").iterdir())


def test_process_0_prints_the_faults_of_all(tmp_path):
    write_folder(tmp_path / "images", 3)
    arguments = ("--config", "tests/tiny.py", "--config.batch_size=12", "--config.data.source=folder:~/images")
    started = commands.start_together(
        "doctor",
        *arguments,
        *("--workdir", tmp_path / "run"),
        environments=[{"HOME": str(tmp_path)}, {"HOME": str(tmp_path / "other")}],
    )
    (output, errors), (others, _) = commands.end(started, [2, 2])
    wrong = [line for verdict, line in findings(output) if verdict == "WRONG"]
    first, source, second = wrong[:3]
    assert first.startswith("process 0 on ")
    assert "batch_size: 12" in first
    assert source.startswith("process 1 on ")
    assert "data.source: " in source
    assert second.startswith("process 1 on ")
    assert "batch_size: 12" in second
    assert any(line.startswith("2 processes share") for _, line in findings(output))
    assert "error: " in errors
    assert findings(others) == []
