"""Reading compiled programs: one shortened by hand, with every notation of XLA, and real ones for TPUs and CPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from umae_jax.planning.hlo import Collective, Kernel, read_program, scopes_by_operation
from umae_jax.training.sharding import make_mesh

PROGRAM = """HloModule jit_step, num_partitions=8

%all-reduce-scatter.8 (input: bf16[768,2048]) -> bf16[96,2048] {
  %all-reduce.9 = (bf16[768,2048]{1,0:T(8,128)(2,1)}) all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}
}

%body (p: s32[]) -> s32[] {
  %fusion.1 = f32[8] fusion(%p), calls=%fused, metadata={op_name="mlp/dot"}, backend_config={"estimated_cycles":"100"}
  %gather = bf16[512,512]{1,0} all-gather(%x), replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
  %s0 = bf16[256,512]{1,0} all-gather(%y), channel_id=9, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="3"}
  %s1 = bf16[256,512]{1,0} all-gather(%y), channel_id=9, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="3"}
  %k = f32[8] custom-call(%p), metadata={op_name="k"}, {"cost_estimate":{"flops":"20","transcendentals":"3",\
"bytes_accessed":"8"}}
  %move = (bf16[48,12]{1,0}, bf16[48,12]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %fused.2 = bf16[96,2048]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.8
}

%condition (p: s32[]) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  ROOT %compare = pred[] compare(%p, %constant.1), direction=LT
}

%long (p: f32[8]) -> f32[8] {
  %fusion.3 = f32[8] fusion(%p), calls=%fused, metadata={op_name="most"}, backend_config={"estimated_cycles":"30"}
}

%short (p: f32[8]) -> f32[8] {
  %fusion.4 = f32[8] fusion(%p), calls=%fused, metadata={op_name="zero"}, backend_config={"estimated_cycles":"2"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %one = (f32[8]) conditional(%a, %x, %x), true_computation=%short, false_computation=%short, metadata={op_name="a"}
  %choice = (f32[8]) conditional(%which, %x, %x), branch_computations={%long, %short}
  %loop = (s32[]) while(%tuple), condition=%condition, body=%body
  %copy = f32[8]{0} copy(%x), backend_config={"window_config":{"estimated_cycles":"7","iteration_bounds":["3"]}}
  %sum = (f32[]{:T(128)}, f32[10,3]{1,0}) all-reduce(%a, %b), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  %alone = f32[4]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}
"""


def test_loop_bodies_count_once_per_iteration_and_pieces_of_a_collective_once():
    program = read_program(PROGRAM, 8)
    fusion, kernel, gathers, scattered = 8 * 4, 8 * 4, 2 * (512 + 2 * 256) * 512, 96 * 2048 * 2
    copied, summed = 8 * 4, 4 + 10 * 3 * 4 + 4 * 4
    unscoped = 4 * (gathers + scattered) + copied + summed
    assert program.bytes == {"mlp/dot": 4 * fusion, "k": 4 * kernel, "a": 0, "": unscoped}
    assert program.kernels == {Kernel("k", 20, 3, 8): 4}
    assert program.cycles == {"mlp/dot": 4 * 100, "": 7}
    assert program.worst_case_cycles == 4 * 100 + 7 + 30 + 2
    assert program.collectives == (
        Collective("all-gather", 8, 8, 4 * (512 + 256) * 512 * 2),  # one of them in two pieces
        Collective("all-reduce", 2, 1, 4 + 10 * 3 * 4),
        Collective("collective-permute", 8, 4, 4 * 48 * 12 * 2),
        Collective("reduce-scatter", 8, 4, 4 * 768 * 2048 * 2),
    )


UNBOUNDED = """
%body (p: pred[8]) -> pred[8] {
  %fusion.1 = pred[8] fusion(%p), calls=%fused, metadata={op_name="round"}, backend_config={"estimated_cycles":"10"}
}

%condition (p: pred[8]) -> pred[] {
  ROOT %any = pred[] reduce(%p, %no), dimensions={0}, to_apply=%or
}

ENTRY %main (x: pred[8]) -> pred[8] {
  %loop = (pred[8]) while(%tuple), condition=%condition, body=%body, metadata={op_name="jit(step)/SCOPE/while"}
}
"""


@pytest.mark.parametrize(("scope", "trips"), [("proposals/nms/vmap()", 8), ("box_head/roi_align", 2), ("decoder", 1)])
def test_loops_that_the_data_end_count_a_typical_number_of_times(scope, trips):
    program = read_program(UNBOUNDED.replace("SCOPE", scope), 1)
    assert program.cycles == {"round": trips * 10}
    assert program.worst_case_cycles == trips * 10


def looped(devices, iterations):
    """A program that sums rows over all devices in each iteration of a loop, and then takes a branch."""
    mesh = make_mesh(1, devices)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())

    def step(x, kernel):
        def body(kernel, _):
            with jax.named_scope("body"):
                return jax.lax.with_sharding_constraint(jnp.tanh(x.T @ jnp.tanh(x @ kernel)), replicated), None

        kernel, _ = jax.lax.scan(body, kernel, length=iterations)
        return jax.lax.cond(kernel.sum() > 0, lambda: jnp.sort(kernel, axis=0), lambda: kernel)

    shapes = [
        jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=replicated),
    ]
    return jax.jit(step, out_shardings=replicated).lower(*shapes).compile().as_text()


def test_a_real_program_for_tpus(tpus):
    few, many = (read_program(looped(tpus, iterations), len(tpus)) for iterations in (3, 6))
    cycles = [sum(count for scope, count in one.cycles.items() if "body" in scope) for one in (few, many)]
    assert cycles[1] == 2 * cycles[0] > 0
    assert few.worst_case_cycles > few.cycles.total()  # by the sort, which is inside a branch
    (sums,) = (one for one in many.collectives if one.kind == "all-reduce")
    assert (sums.group_size, sums.count, sums.bytes) == (4, 6, 6 * 256 * 256 * 4)


def test_a_real_program_for_cpus():
    text = looped(jax.devices(), 3)
    program = read_program(text, 8)
    assert program.cycles.total() == 0  # only XLA:TPU schedules cycles
    assert Collective("all-reduce", 8, 3, 3 * 256 * 256 * 4) in program.collectives
    assert sum(size for scope, size in program.bytes.items() if "body" in scope) > 3 * 2 * 256 * 256 * 4
    assert any("body" in scope for scope in scopes_by_operation(text).values())


def test_seconds_of_a_collective():
    assert Collective("all-gather", 8, 1, 800).seconds(link_bandwidth=100, links=1) == pytest.approx(7)
    assert Collective("all-reduce", 8, 1, 800).seconds(link_bandwidth=100, links=2) == pytest.approx(7)
    assert Collective("collective-permute", 8, 1, 800).seconds(link_bandwidth=100, links=1) == pytest.approx(8)
