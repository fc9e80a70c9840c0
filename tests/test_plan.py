"""Plans; those for TPUs need libtpu, which compiles on any machine."""

import json
import subprocess
import sys

import pytest

from tests import commands


def test_a_plan_for_the_devices_that_are_there(tmp_path):
    path = tmp_path / "plan.json"
    table, errors = commands.run("plan", "--config", "tests/tiny.py", "--json", path)
    (plan,) = json.loads(path.read_text())
    assert (plan["chips"], plan["batch"], plan["steps"], plan["fits"]) == (8, 2, 12, True)
    assert plan["flops"] > 1e6
    assert plan["peak"] >= plan["arguments"] > 4 * 8000  # three copies of some thousand parameters, and the batch
    # Gathered are the sums of the bias over what each device has, of nine cases: see `select_case`.
    assert [(one["kind"], one["devices"]) for one in plan["collectives"]] == [("all-gather", 8), ("all-reduce", 8)]
    assert plan["step"] is None  # nothing is published of this device
    assert [line.split()[-1] for line in table.splitlines() if line.startswith("images a step and chip")] == ["2"]
    assert "compiled in" in errors


def test_a_plan_for_tpus(tmp_path):
    pytest.importorskip("libtpu", reason="the plan extra is not installed")  # part of the test extra
    path = tmp_path / "plan.json"
    arguments = ("--config", "tests/tiny.py", "--config.mesh.fsdp=2", "--topology=v5e:2x2", "--topology=v6e:2x2")
    table, _ = commands.run("plan", *arguments, "--nolargest", "--parts", "--json", path)
    plans = json.loads(path.read_text())
    assert [plan["target"] for plan in plans] == ["v5e:2x2", "v6e:2x2"]
    for plan in plans:
        assert plan["chips"] == 4
        # Kernels are gathered, their gradients summed; passed around in loops they would cost more.
        kinds = {one["kind"] for one in plan["collectives"]}
        assert "all-gather" in kinds
        assert "collective-permute" not in kinds
        assert plan["step"] == plan["scheduled"] + plan["interconnect"]
        assert plan["flops"] > 1e6
        assert plan["images_per_second"] == pytest.approx(4 / plan["step"])
        assert plan["communication"] == pytest.approx(plan["interconnect"] / plan["step"])
        assert plan["reading_cores"] == pytest.approx(plan["images_per_second"] / 400)
        assert plan["chip_hours"] == pytest.approx(4 * 12 * plan["step"] / 3600)
        assert sum(map(sum, plan["parts"].values())) == plan["cycles"]
        assert sum(map(sum, plan["parts_bytes"].values())) > plan["arguments"]  # which are all read
        assert {"stage 1, attention", "decoder, mlp", "optimizer"} <= {*plan["parts_bytes"]}
        # The products are not all of a model so small, and none is counted twice.
        assert 0.5 < sum(map(sum, plan["parts_flops"].values())) / plan["flops"] < 1
        assert {"stage 1, attention", "decoder, mlp"} <= {*plan["parts_flops"]} <= {*plan["parts"]}
        assert {"stage 1, attention", "stage 2, mlp", "decoder, attention", "loss", "optimizer"} <= {*plan["parts"]}
        assert sum(backward for _, backward in plan["parts"].values()) > plan["cycles"] / 8
        assert plan["worst_case_cycles"] > plan["cycles"]  # by the passes for the largest logits
    assert plans[1]["scheduled"] < plans[0]["scheduled"]
    assert "v6e:2x2, the cycles of a step by part of the model:" in table
    assert "v5e:2x2" in table


def test_a_plan_of_a_step_with_kernels(tmp_path):
    pytest.importorskip("libtpu", reason="the plan extra is not installed")  # part of the test extra
    path = tmp_path / "plan.json"
    arguments = ("--config", "tests/tiny.py", "--config.fused_attention=True", "--config.mesh.fsdp=2")
    table, _ = commands.run("plan", *arguments, "--topology=v5e:2x2", "--nolargest", "--parts", "--json", path)
    (plan,) = json.loads(path.read_text())
    # Windows of 2 x 2 tokens, at stage 2, take the plain form.
    parts = [
        f"{part}, {way}" for part in ("decoder, attention", "stage 1, attention") for way in ("backward", "forward")
    ]
    assert list(plan["kernels"]) == parts
    assert all(0 < limit < plan["step"] for limit in (plan["kernels_limit"], plan["scheduled"], plan["interconnect"]))
    assert "v5e:2x2, what kernels must do at least" in table


def test_without_the_compiler_it_says_what_to_install():
    program = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'libtpu' else find(name, *more)\n"
        "from umae_jax import cli, plan\n"
        "cli.run(plan.main)"
    )
    arguments = ["--config", "tests/tiny.py", "--topology=v5e:2x4"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=commands.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        'error: --topology: the compiler for TPUs is missing; install it with pip install "umae_jax[plan]"\n'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--topology=h100",),
            "--topology: h100 can be planned for only where it is, and here is 8 x cpu",
        ),
        (("--topology=v5e:3x3",), "--topology: there is no v5e:3x3; choose one of v5e:1x1"),
        (("--config.grad_accum_steps=3",), "batch_size: 16 does not divide among 8 devices x 3 accumulated parts"),
        (("--config.batch_size=12",), "batch_size: 12 does not divide among 8 devices"),
        (("--growth=gs://bucket/growth",), "--growth: gs://bucket/growth is in a bucket"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message):
    _, errors = commands.run("plan", "--config", "tests/tiny.py", *arguments, status=2)
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
