import pytest

from umae_jax.planning.hardware import Chip
from umae_jax.planning.hlo import Kernel
from umae_jax.planning.parts import KernelBound, Passes, by_part, cost_table, kernel_bounds, part_of

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
        (STEP + "transpose(jvp(box_head))/roi_align/while/body/closed_call/dot_general", "box head, roi align"),
        (STEP + "jvp(proposals)/nms/vmap(vmap())/while", "proposals, nms"),
        ("", "other"),
    ],
)
def test_a_scope_names_a_part(scope, part):
    assert part_of(scope) == part


def test_cycles_are_summed_by_part_forward_and_backward():
    cycles = {STEP + "jvp(loss)/sub": 2, STEP + "jvp(loss)/mul": 3, STEP + "transpose(jvp(loss))/mul": 10, "": 100}
    parts = by_part(cycles)
    assert parts == {"other": (100, 0), "loss": (5, 10)}
    flops, moved = {"loss": Passes(2 * 10**9, 10**9)}, {"other": Passes(0, 5 * 10**8)}
    rows = [line.split() for line in cost_table(parts, flops, moved, clock=1000.0).splitlines()[1:]]
    assert rows[0] == ["other", "0.00", "0.00", "0.00", "87.0%", "100.00", "0.0", "0.50"]
    assert rows[1] == ["loss", "0.00", "0.00", "0.00", "13.0%", "15.00", "3.0", "0.00"]
    assert rows[2] == ["all", "0.00", "0.00", "0.00", "100.0%", "115.00", "3.0", "0.50"]


def test_kernels_are_bounded_by_part_and_direction():
    chip = Chip(peak_flops=100.0, memory=1.0, bandwidth=10.0)
    kernels = {
        Kernel(STEP + "jvp(decoder)/attention/shard_map/forward_kernel/pallas_call", 50, 5, 20): 2,
        Kernel(STEP + "transpose(jvp(decoder))/attention/shard_map/backward_kernel/pallas_call", 200, 7, 10): 1,
    }
    bounds = kernel_bounds(kernels, chip)
    assert bounds == {
        "decoder, attention, backward": KernelBound(1, 200, 7, 10, flops_seconds=2.0, memory_seconds=1.0),
        "decoder, attention, forward": KernelBound(2, 100, 10, 40, flops_seconds=1.0, memory_seconds=4.0),
    }
    assert [bound.seconds for bound in bounds.values()] == [2.0, 4.0]
