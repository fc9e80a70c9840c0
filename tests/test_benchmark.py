import glob
import json

import pytest

from tests import commands
from tests.images import write_folder

TINY = ("--config", "tests/tiny.py")


def test_the_loader_is_compared_with_plain_pillow(tmp_path):
    folder = write_folder(tmp_path, 8, height=600, width=800)  # large enough that decoding takes most of the time
    arguments = [*TINY, f"--config.data.source=folder:{folder}", "--loader", "--num_images=256", "--rounds=2"]
    printed, _ = commands.run("benchmark", *arguments, "--json")
    result = json.loads(printed)
    assert result["loader"]["images_per_second_per_core"] > 0
    assert result["pillow"]["images_per_second_per_core"] > 0
    # Wrong accounting, such as one contender's work counted as the other's, would show.
    assert 0.1 < result["ratio"]["median"] < 20  # the loader decodes at a lower resolution, plain Pillow does not
    assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
    assert result["with_step"]["images_per_second"] > 0
    assert 0 <= result["with_step"]["data_wait"] < 1


def test_steps_take_turns():
    printed, _ = commands.run(
        "benchmark", *TINY, "--against=tests/tiny.py", "--batch=2", "--rounds=2", "--parts", "--json"
    )
    result = json.loads(printed)
    first, second = result["steps"]
    assert result["device"] == "8 x cpu"
    for one in (first, second):
        assert one["name"] == "tiny"
        assert one["batch_size"] == 16
        assert one["images_per_second"] == pytest.approx(16 / one["seconds"]["median"])
        assert one["flops_per_second"] == pytest.approx(one["flops"] / one["seconds"]["median"])
        assert one["seconds"]["min"] <= one["seconds"]["median"] <= one["seconds"]["max"]
        assert one["peak_bytes"] >= one["temp_bytes"] > 0
        assert one["mfu"] is None  # there are no published figures of this device
        assert {"stage 1, attention", "stage 2, mlp", "decoder, mlp", "optimizer"} <= {*one["nanoseconds_by_part"]}
        for part in ("stage 1, attention", "decoder, mlp"):
            assert min(one["nanoseconds_by_part"][part]) > 0  # forward and backward
    assert first["speedup"] == {"min": 1, "median": 1, "max": 1}
    assert 0.1 < second["speedup"]["median"] < 10  # it is the same step


def test_a_peer_takes_its_turn():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    printed, _ = commands.run("benchmark", *TINY, "--peer=torch_um_mae", "--batch=2", "--rounds=1", devices=1)
    lines = printed.splitlines()
    assert lines[0] == "1 x cpu, 2 images per step, float32, 1 rounds"
    assert [line.split()[0] for line in lines[2:]] == ["tiny", "torch_um_mae"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against=none.py",), "--against: there is no file none.py"),
        (("--against=README.md",), "--against: README.md is not a Python file"),
        (("--against=tests/images.py",), "--against: tests/images.py: it must define get_config()"),
        (("--loader", "--config.data.workers=2"), "data.workers: "),
    ],
)
def test_bad_input_is_an_error_in_one_sentence(arguments, message):
    _, errors = commands.run("benchmark", *TINY, *arguments, status=2)
    assert f"error: {message}" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")), reason="there may be a TPU")
def test_a_profiler_that_would_crash_is_not_started():
    pytest.importorskip("libtpu", reason="the plan extra is not installed")
    with commands.start("benchmark", *TINY, "--parts", environment={"JAX_PLATFORMS": ""}) as process:
        ((_, errors),) = commands.end([process], [2])
    assert "error: --parts: " in errors
    assert "JAX_PLATFORMS=" in errors
