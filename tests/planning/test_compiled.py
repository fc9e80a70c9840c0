"""What is read of compiled programs; the lines are XLA's, shortened."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from umae_jax.planning.compiled import Collective, Kernel, analyze, read_program
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


def test_loops_are_counted_as_often_as_they_go_round_and_pieces_once():
    cycles, moved, at_most, collectives, kernels = read_program(PROGRAM, 8)
    fusion, kernel, gathers, scattered = 8 * 4, 8 * 4, 2 * (512 + 2 * 256) * 512, 96 * 2048 * 2
    copied, summed = 8 * 4, 4 + 10 * 3 * 4 + 4 * 4
    assert moved == {"mlp/dot": 4 * fusion, "k": 4 * kernel, "a": 0, "": 4 * (gathers + scattered) + copied + summed}
    assert kernels == {Kernel("k", 20, 3, 8): 4}
    assert cycles == {"mlp/dot": 4 * 100, "": 7}
    assert at_most == 4 * 100 + 7 + 30 + 2
    assert collectives == (
        Collective("all-gather", 8, 8, 4 * (512 + 256) * 512 * 2),  # one of them in two pieces
        Collective("all-reduce", 2, 1, 4 + 10 * 3 * 4),
        Collective("collective-permute", 8, 4, 4 * 48 * 12 * 2),
        Collective("reduce-scatter", 8, 4, 4 * 768 * 2048 * 2),
    )


def test_time_on_the_interconnect():
    assert Collective("all-gather", 8, 1, 800).seconds(link=100, links=1) == pytest.approx(7)
    assert Collective("all-reduce", 8, 1, 800).seconds(link=100, links=2) == pytest.approx(7)
    assert Collective("collective-permute", 8, 1, 800).seconds(link=100, links=1) == pytest.approx(8)


def test_a_real_program():
    mesh = make_mesh()
    split, whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=split)
    kernel = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=whole)
    lowered = jax.jit(lambda rows, kernel: (rows @ kernel).sum(0), out_shardings=whole).lower(rows, kernel)
    told = analyze(lowered.compile(), 8)
    assert told.arguments == 2 * 32 * 4 + 32 * 64 * 4
    assert told.cycles is None
    assert told.collectives == (Collective("all-reduce", 8, 1, 64 * 4),)
    assert told.peak >= told.arguments
    assert np.isfinite(told.bytes)
