import pytest

from umae_jax.errors import UserError
from umae_jax.planning.hardware import TPUS, parse_topology


@pytest.mark.parametrize(("name", "chips"), [("v5e:1x1", 1), ("v5e:16x16", 256), ("v5p:4x8x8", 256), ("v6e:2x4", 8)])
def test_a_topology_has_its_chips(name, chips):
    assert parse_topology(name).num_chips == chips
    assert parse_topology(name).chip is TPUS[name.partition(":")[0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "v9:2x2.*v5e, v5p, v6e"),
        ("v5e", "there is no v5e; choose one of v5e:1x1, v5e:2x2, "),
        ("v5e:16x32", "there is no v5e:16x32; choose one of .*v5e:16x16"),
        ("v5e:4x4x4", "there is no v5e:4x4x4"),
        ("v5e:4xfour", "there is no v5e:4xfour"),
        ("v5p:4x4", "there is no v5p:4x4; choose one of v5p:2x2x1, .*v5p:4x4x4, .* and so on in steps of 4"),
        ("v5p:8x4x4", "there is no v5p:8x4x4"),
        ("v5p:4x4x32", "there is no v5p:4x4x32"),
    ],
)
def test_a_topology_that_does_not_exist_is_an_error(name, message):
    with pytest.raises(UserError, match=f"^--topology: .*{message}"):
        parse_topology(name)


def test_links_of_a_collective():
    whole, part = parse_topology("v5e:16x16"), parse_topology("v5e:4x4")
    assert whole.links("all-reduce", 256) == 4  # two rings
    assert whole.links("all-gather", 16) == 2  # one of them
    assert whole.links("all-gather", 8) == 1  # half of it is a line
    assert whole.links("collective-permute", 256) == 1
    assert part.links("all-reduce", 16) == 2  # two lines
    assert part.links("all-reduce", 4) == 1
    assert parse_topology("v5p:4x4x4").links("all-reduce", 64) == 6
    assert parse_topology("v5e:1x1").links("all-reduce", 1) == 1
