import pytest

from umae_jax.planning.compiled import Kernel
from umae_jax.planning.hardware import Chip
from umae_jax.planning.parts import Bound, bounds, by_part, part_of, table

STEP = "jit(train_step)/"


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        (STEP + "jvp(encoder)/stage_1/attention/...nc,chd->...hdn/dot_general", "stage 1, attention"),
        (STEP + "transpose(jvp(encoder))/stage_3/merge/dot_general", "stage 3, merge"),
        (STEP + "jvp(encoder)/patch_embedding/dot_general", "patch embedding"),
        (STEP + "transpose(jvp(decoder))/mlp/mul", "decoder, mlp"),
        (STEP + "jvp(decoder)/dot_general", "decoder"),
        (STEP + "jvp(loss)/jit(_var)/reduce_sum", "loss"),
        (STEP + "optimizer/mul", "optimizer"),
        (STEP + "jvp(encoder)/jit(_where)/select_n", "encoder"),
        ("", "other"),
    ],
)
def test_a_scope_names_a_part(scope, part):
    assert part_of(scope) == part


def test_cycles_are_summed_by_part_forward_and_backward():
    cycles = {STEP + "jvp(loss)/sub": 2, STEP + "jvp(loss)/mul": 3, STEP + "transpose(jvp(loss))/mul": 10, "": 100}
    parts = by_part(cycles)
    assert parts == {"other": (100, 0), "loss": (5, 10)}
    flops, moved = {"loss": (2 * 10**9, 10**9)}, {"other": (0, 5 * 10**8)}
    rows = [line.split() for line in table(parts, 1000.0, flops, moved).splitlines()[1:]]
    assert rows[0] == ["other", "0.00", "0.00", "0.00", "87.0%", "100.00", "0.0", "0.50"]
    assert rows[1] == ["loss", "0.00", "0.00", "0.00", "13.0%", "15.00", "3.0", "0.00"]
    assert rows[2] == ["all", "0.00", "0.00", "0.00", "100.0%", "115.00", "3.0", "0.50"]


def test_kernels_are_bounded_by_part_and_direction():
    chip = Chip(flops=100.0, memory=1.0, bandwidth=10.0)
    kernels = {
        Kernel(STEP + "jvp(decoder)/attention/shard_map/forward_kernel/pallas_call", 50, 5, 20): 2,
        Kernel(STEP + "transpose(jvp(decoder))/attention/shard_map/backward_kernel/pallas_call", 200, 7, 10): 1,
    }
    told = bounds(kernels, chip)
    assert told == {
        "decoder, attention, backward": Bound(1, 200, 7, 10, flops_limit=2.0, bytes_limit=1.0),
        "decoder, attention, forward": Bound(2, 100, 10, 40, flops_limit=1.0, bytes_limit=4.0),
    }
    assert [bound.seconds for bound in told.values()] == [2.0, 4.0]
