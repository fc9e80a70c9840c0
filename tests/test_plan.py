"""The plan command; plans for TPUs need libtpu, which compiles on any machine."""

import itertools
import json
import subprocess
import sys

import pytest

from tests import commands

TINY = ("--config", "tests/tiny.py")


def test_a_plan_for_local_devices():
    output, errors = commands.run("plan", *TINY, "--json")
    (plan,) = json.loads(output)
    assert (plan["num_chips"], plan["batch_per_chip"], plan["total_steps"], plan["fits"]) == (8, 2, 12, True)
    assert plan["flops"] > 1e6
    assert plan["peak_bytes"] >= plan["argument_bytes"] > 4 * 8000  # three copies of the parameters, and the batch
    # The bias gradient is summed per device for nine cases, and the sums are gathered.
    kinds = [(one["kind"], one["group_size"]) for one in plan["collectives"]]
    assert kinds == [("all-gather", 8), ("all-reduce", 8)]
    assert plan["step_seconds"] is None  # there are no published figures of this device
    assert "compiled in" in errors


def test_a_plan_for_tpus():
    pytest.importorskip("libtpu", reason="the plan extra is not installed")
    arguments = (*TINY, "--config.mesh.fsdp=2", "--topology=v5e:2x2", "--topology=v6e:2x2", "--nolargest", "--parts")
    output, _ = commands.run("plan", *arguments, "--json")
    plans = json.loads(output)
    assert [plan["target"] for plan in plans] == ["v5e:2x2", "v6e:2x2"]
    for plan in plans:
        assert plan["num_chips"] == 4
        # Weights are gathered and gradients reduced; passing them around in loops would cost more.
        kinds = {one["kind"] for one in plan["collectives"]}
        assert "all-gather" in kinds
        assert "collective-permute" not in kinds
        assert plan["step_seconds"] == plan["scheduled_seconds"] + plan["collective_seconds"]
        assert plan["flops"] > 1e6
        assert plan["images_per_second"] == pytest.approx(4 / plan["step_seconds"])
        assert plan["collective_share"] == pytest.approx(plan["collective_seconds"] / plan["step_seconds"])
        assert plan["decoding_cores"] == pytest.approx(plan["images_per_second"] / 400)
        assert plan["mfu"] == pytest.approx(plan["flops_seconds"] / plan["step_seconds"])
        assert plan["chip_hours"] == pytest.approx(4 * 12 * plan["step_seconds"] / 3600)
        cycles, flops, moved = (plan[f"{name}_by_part"] for name in ("cycles", "flops", "bytes"))
        assert sum(map(sum, cycles.values())) == plan["cycles"]
        assert sum(map(sum, moved.values())) > plan["argument_bytes"]  # all arguments are read
        assert {"stage 1, attention", "decoder, mlp", "optimizer"} <= {*moved}
        # Matrix products are most of the FLOPs even of a model so small, and none is counted twice.
        assert 0.5 < sum(map(sum, flops.values())) / plan["flops"] < 1
        assert {"stage 1, attention", "decoder, mlp"} <= {*flops} <= {*cycles}
        assert {"stage 1, attention", "stage 2, mlp", "decoder, attention", "loss", "optimizer"} <= {*cycles}
        assert sum(backward for _, backward in cycles.values()) > plan["cycles"] / 8
        assert plan["worst_case_cycles"] > plan["cycles"]  # by the passes for the max logits
    assert plans[1]["scheduled_seconds"] < plans[0]["scheduled_seconds"]


def test_a_plan_with_pallas_kernels():
    pytest.importorskip("libtpu", reason="the plan extra is not installed")
    arguments = (*TINY, "--config.fused_attention=True", "--config.mesh.fsdp=2", "--topology=v5e:2x2", "--nolargest")
    output, _ = commands.run("plan", *arguments, "--json")
    (plan,) = json.loads(output)
    # Windows of 2 x 2 tokens, in stage 2, do not use the kernel.
    parts = itertools.product(("decoder, attention", "stage 1, attention"), ("backward", "forward"))
    assert list(plan["kernels"]) == [", ".join(names) for names in parts]
    assert all(0 < plan[f"{name}_seconds"] < plan["step_seconds"] for name in ("kernel", "scheduled", "collective"))


def test_a_missing_compiler_is_an_error():
    program = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'libtpu' else find(name, *more)\n"
        "from umae_jax import cli, plan\n"
        "cli.run(plan.main)"
    )
    command = [sys.executable, "-c", program, *TINY, "--topology=v5e:2x4"]
    done = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology: ")
    assert 'pip install "umae_jax[plan]"' in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "start", "value"),
    [
        (("--topology=h100",), "--topology:", "h100"),
        (("--topology=v5e:3x3",), "--topology:", "v5e:1x1"),
        (("--config.grad_accum_steps=3",), "batch_size:", "16"),
        (("--config.batch_size=12",), "batch_size:", "12"),
        (("--growth=gs://bucket/growth",), "--growth:", "gs://bucket/growth"),
        (("--growth=growth", "--json"), "--growth", "--json"),
    ],
)
def test_bad_input_is_an_error_in_one_sentence(arguments, start, value):
    _, errors = commands.run("plan", *TINY, *arguments, status=2)
    assert errors.startswith(f"error: {start}")
    assert value in errors
    assert errors.count("\n") == 1
