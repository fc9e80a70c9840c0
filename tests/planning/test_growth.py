import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests import commands, tiny
from umae_jax.errors import UserError
from umae_jax.planning import growth, growth_report
from umae_jax.planning.targets import Target

PROGRAM = """
import pathlib, sys
from tests import tiny
from umae_jax.planning import growth
from umae_jax.planning.targets import find_target
variants = growth.make_variants(tiny.get_config(), [find_target("v5e:2x2")], print)
points = growth.measure(variants[:1], pathlib.Path(sys.argv[1]), print)
pathlib.Path(sys.argv[1], "growth.json").write_text(growth.to_json(points))
"""


def target(devices, memory=None):
    return Target(f"{devices} x cpu", jax.devices()[:devices], None, memory)


def chosen(variants, varied, values):
    return [variant for variant in variants if variant.varied == varied and variant.value in values]


def ignore(line):
    pass


def point(varied, value, parts, batch_per_chip=1):
    cost = growth.Cost("", 1.0 * value, sum(parts.values()), 2.0 * value + 1, 3, 5, parts, 1.0)
    return growth.Point(varied, value, batch_per_chip, 8, cost)


def test_one_quantity_is_varied_at_a_time():
    lines = []
    variants = growth.make_variants(tiny.get_config(), [target(2), target(4), target(8)], lines.append)
    values = {varied: [one.value for one in variants if one.varied == varied] for varied in growth.AXES}
    assert values["chips"] == [2, 4, 8]
    assert values["batch"] == [8, 4, 16, 32]
    assert values["depth"] == [2, 1, 4, 6]
    assert values["image size"] == [32, 48, 64, 96, 128]
    assert [line.partition(":")[0] for line in lines] == ["skipped 24 x 24"]
    for one in variants:
        config, chips = one.config, len(one.target.devices)
        if one.varied == "image size":  # a quarter for each doubling, so that two series have as many pixels a step
            assert one.batch_per_chip == {32: 8, 48: 2, 64: 2, 96: 1, 128: 1}[one.value]
        else:
            assert one.batch_per_chip == (one.value if one.varied == "batch" else 8)
        assert config.batch_size == one.batch_per_chip * chips
        assert chips == (one.value if one.varied == "chips" else 2)
        assert config.model.depths == (1, one.value if one.varied == "depth" else 2)
        assert config.image_size == ((one.value if one.varied == "image size" else 32),) * 2
        assert config.model.window == (6 if config.image_size[0] in (48, 96) else 8)


def test_costs_of_compiled_programs_are_cached(tmp_path):
    variants = chosen(growth.make_variants(tiny.get_config(), [target(2)], ignore), "depth", (2, 4))
    lines = []
    small, large = growth.measure(variants, tmp_path, lines.append)
    assert (small.value, large.value, small.batch_per_chip, small.window) == (2, 4, 8, 8)
    assert large.cost.flops > small.cost.flops > 1e6
    assert large.cost.bytes_accessed > small.cost.bytes_accessed > 1e5
    assert large.cost.temp_bytes > small.cost.temp_bytes > 1e4
    assert large.cost.collective_bytes > small.cost.collective_bytes > 4 * 1000
    assert small.cost.cycles is None  # only the TPU compiler schedules cycles
    assert lines[0].startswith("1 of 2: 2 x cpu, 32 x 32, depths 1-2, 8 images per chip compiled; about")
    for path in tmp_path.iterdir():
        cost = json.loads(path.read_text())
        path.write_text(json.dumps(cost | {"temp_bytes": 7}))
    again = growth.measure(variants, tmp_path, ignore)
    assert again == [one._replace(cost=replace(one.cost, temp_bytes=7)) for one in (small, large)]
    values = json.loads(growth.to_json(again))
    assert [(one["varied"], one["cost"]["temp_bytes"]) for one in values] == [("depth", 7), ("depth", 7)]


def test_a_base_that_does_not_fit_is_an_error(tmp_path):
    variants = chosen(growth.make_variants(tiny.get_config(), [target(2, memory=1e5)], ignore), "depth", (2,))
    with pytest.raises(UserError, match=r"batch_size: 2 x cpu, .* 8 images per chip needs .* GiB"):
        growth.measure(variants, tmp_path, ignore)


def test_cycles_by_part_for_tpus(tmp_path):
    pytest.importorskip("libtpu", reason="the plan extra is not installed")
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], cwd=commands.ROOT, check=True)
    (value,) = json.loads((tmp_path / "growth.json").read_text())
    parts = value["cost"]["cycles_by_part"]
    assert sum(parts.values()) == value["cost"]["cycles"] > 0
    assert {*map(growth_report.group_of, parts)} == {*growth_report.GROUPS}


def test_growth_is_fitted_printed_and_drawn(tmp_path):
    sizes = [
        point(
            "image size", side, {"stage 1, attention": side**2, "decoder, attention": side**4 // 256}, batch_per_chip=2
        )
        for side in (16, 32, 64)
    ]
    depths = [point("depth", blocks, {"stage 3, mlp": 5 + 2 * blocks, "loss": blocks**2}) for blocks in (2, 4, 8)]
    by_name = {line.name: line for line in growth_report.fit_lines(sizes, by_group=True)}
    assert by_name["encoder attention"].exponent == pytest.approx(1)
    assert by_name["decoder attention"].exponent == pytest.approx(2)
    np.testing.assert_allclose(by_name["encoder attention"].y, [128, 512, 2048])  # per image
    by_name = {line.name: line for line in growth_report.fit_lines(depths, by_group=True)}
    assert by_name["encoder MLPs"].deviation == pytest.approx(0, abs=1e-9)
    assert by_name["rest"].deviation > 0.05
    too_large = depths[-1]._replace(value=16, cost=replace(depths[-1].cost, reason="needs 20 GiB"))
    assert len(growth_report.fit_lines([*depths, too_large], by_group=True)[0].x) == 3

    table = growth_report.table([*sizes, *depths, too_large])
    assert "decoder attention: 2.00" in table
    assert "encoder MLPs: 0.0%" in table
    assert "needs 20 GiB" in table
    growth_report.draw([*sizes, *depths, too_large], "a title", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
