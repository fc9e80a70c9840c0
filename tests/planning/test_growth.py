import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests import commands, tiny
from umae_jax.errors import UserError
from umae_jax.planning import growth
from umae_jax.planning.targets import Target

PROGRAM = """
import pathlib, sys
from tests import tiny
from umae_jax.planning import growth
from umae_jax.planning.targets import find_target
settings = growth.settings(tiny.get_config(), [find_target("v5e:2x2")], print)
points = growth.measure(settings[:1], pathlib.Path(sys.argv[1]), print)
pathlib.Path(sys.argv[1], "growth.json").write_text(growth.to_json(points))
"""


def target(devices, memory=None):
    return Target(f"{devices} x cpu", jax.devices()[:devices], None, memory)


def chosen(settings, varied, values):
    return [setting for setting in settings if setting.varied == varied and setting.value in values]


def ignore(line):
    pass


def point(varied, value, parts, images=1):
    cost = growth.Cost("", 1.0 * value, sum(parts.values()), 2.0 * value + 1, 3, 5, parts, 1.0)
    return growth.Point(varied, value, images, 8, cost)


def test_one_thing_is_varied_at_a_time():
    said = []
    settings = growth.settings(tiny.get_config(), [target(2), target(4), target(8)], said.append)
    values = {varied: [one.value for one in settings if one.varied == varied] for varied in growth.AXES}
    assert values["devices"] == [2, 4, 8]
    assert values["batch"] == [8, 4, 16, 32]
    assert values["depth"] == [2, 1, 4, 6]
    assert values["image size"] == [32, 48, 64, 96, 128]
    assert [line.partition(":")[0] for line in said] == ["left out 24 x 24"]
    for one in settings:
        config, chips = one.config, len(one.target.devices)
        if one.varied == "image size":  # a quarter for each doubling, so that two series have as many pixels a step
            assert one.images == {32: 8, 48: 2, 64: 2, 96: 1, 128: 1}[one.value]
        else:
            assert one.images == (one.value if one.varied == "batch" else 8)
        assert config.batch_size == one.images * chips
        assert chips == (one.value if one.varied == "devices" else 2)
        assert config.model.depths == (1, one.value if one.varied == "depth" else 2)
        assert config.image_size == ((one.value if one.varied == "image size" else 32),) * 2
        assert config.model.window == (6 if config.image_size[0] in (48, 96) else 8)


def test_what_has_been_compiled_is_not_compiled_again(tmp_path):
    settings = chosen(growth.settings(tiny.get_config(), [target(2)], ignore), "depth", (2, 4))
    said = []
    small, large = growth.measure(settings, tmp_path, said.append)
    assert (small.value, large.value, small.images, small.window) == (2, 4, 8, 8)
    assert large.cost.flops > small.cost.flops > 1e6
    assert large.cost.bytes > small.cost.bytes > 1e5
    assert large.cost.temp_bytes > small.cost.temp_bytes > 1e4
    assert large.cost.collectives > small.cost.collectives > 4 * 1000
    assert small.cost.cycles is None  # only a compiler for TPUs tells
    assert said[0].startswith("1 of 2: 2 x cpu, 32 x 32, blocks 1-2, 8 images a chip compiled; about")
    for path in tmp_path.iterdir():
        cost = json.loads(path.read_text())
        path.write_text(json.dumps(cost | {"temp_bytes": 7}))
    again = growth.measure(settings, tmp_path, ignore)
    assert again == [one._replace(cost=replace(one.cost, temp_bytes=7)) for one in (small, large)]
    told = json.loads(growth.to_json(again))
    assert [(one["varied"], one["cost"]["temp_bytes"]) for one in told] == [("depth", 7), ("depth", 7)]


def test_what_does_not_fit(tmp_path):
    settings = chosen(growth.settings(tiny.get_config(), [target(2, memory=1e5)], ignore), "depth", (2,))
    with pytest.raises(UserError, match=r"batch_size: 2 x cpu, .* 8 images a chip needs .* GiB; choose a smaller one"):
        growth.measure(settings, tmp_path, ignore)


def test_cycles_by_part_for_tpus(tmp_path):
    pytest.importorskip("libtpu", reason="the plan extra is not installed")  # part of the test extra
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], cwd=commands.ROOT, check=True)
    (told,) = json.loads((tmp_path / "growth.json").read_text())
    parts = told["cost"]["parts"]
    assert sum(parts.values()) == told["cost"]["cycles"] > 0
    assert {*map(growth.group_of, parts)} == {*growth.GROUPS}


def test_growth_is_told_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")  # part of the test extra
    sizes = [
        point("image size", side, {"stage 1, attention": side**2, "decoder, attention": side**4 // 256}, images=2)
        for side in (16, 32, 64)
    ]
    depths = [point("depth", blocks, {"stage 3, mlp": 5 + 2 * blocks, "loss": blocks**2}) for blocks in (2, 4, 8)]
    by_name = {line.name: line for line in growth.lines(sizes, by_group=True)}
    assert by_name["encoder attention"].exponent == pytest.approx(1)
    assert by_name["decoder attention"].exponent == pytest.approx(2)
    np.testing.assert_allclose(by_name["encoder attention"].y, [128, 512, 2048])  # an image, of two
    by_name = {line.name: line for line in growth.lines(depths, by_group=True)}
    assert by_name["encoder MLPs"].bend == pytest.approx(0, abs=1e-9)
    assert by_name["rest"].bend > 0.05
    too_large = depths[-1]._replace(value=16, cost=replace(depths[-1].cost, needs="needs 20 GiB"))
    assert len(growth.lines([*depths, too_large], by_group=True)[0].x) == 3

    table = growth.table([*sizes, *depths, too_large])
    assert "decoder attention: 2.00" in table
    assert "encoder MLPs: 0.0%" in table
    assert "needs 20 GiB" in table
    growth.draw([*sizes, *depths, too_large], "a title", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
