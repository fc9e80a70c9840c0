from dataclasses import replace

import pytest

from tests import tiny
from umae_jax.errors import UserError
from umae_jax.planning.hardware import TPUS
from umae_jax.planning.parts import KernelBound, Passes
from umae_jax.planning.plan import make_plan, part_tables, table
from umae_jax.planning.targets import local_target


@pytest.fixture(scope="module")
def plan():
    return make_plan(tiny.get_config(), local_target(), 160, 8e9, {"loss/mul": 80}, print, search=False)


def test_plans_are_the_columns_of_one_table(plan):
    kernels = {"decoder, attention, forward": KernelBound(3, 10, 10, 10, 1.0, 2.0)}
    other = replace(plan, target="other", fits=False, reason="needs 20.00 GiB", kernels=kernels, kernel_seconds=2e-3)
    rows = [line.split("  ") for line in table([plan, other]).splitlines()]
    values = {row[0] or row[1]: [value.strip() for value in row[2:] if value] for row in rows}
    assert values["chips"] == ["8", "8"]
    assert values["batch per chip"] == ["2", "2"]
    assert values["steps in total"] == ["12", "12"]
    assert values["fits in memory"] == ["yes", "no, needs 20.00 GiB"]
    assert values["model FLOPs"] == ["0.001 TFLOP", "0.001 TFLOP"]
    assert values["Pallas kernel calls, not in the schedule"] == ["0", "3"]
    assert values["Pallas kernels, lower bound"] == ["-", "2.00 ms"]
    assert values["images/s/chip"] == ["-", "-"]


def test_costs_of_parts_are_printed_if_cycles_are_known(plan):
    assert part_tables(plan, local_target()) == ""
    bound = KernelBound(3, 10, 10, 10, 1.0, 2.0)
    scheduled = replace(plan, cycles_by_part={"loss": Passes(10**6, 2 * 10**6)}, kernels={"loss, forward": bound})
    text = part_tables(scheduled, replace(local_target(), chip=TPUS["v5e"]))
    assert plan.flops_by_part == {"loss": (10, 0)}  # per chip
    assert text.count("loss") == 2


def test_a_batch_size_that_is_no_multiple_of_the_devices_is_an_error():
    config = tiny.get_config()
    config.batch_size = 12
    with pytest.raises(UserError, match="batch_size: 12"):
        make_plan(config, local_target(), 160, None, {}, print, search=False)
