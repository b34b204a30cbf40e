"""Compiled programs read from their text: written by hand as TPUs have them, and really compiled for 8 CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fot.compile import costs, hlo
from fot.compile.groups import groups, mesh_axes

# A loop of 3 in a loop of 5, whose limits a condition and a carried constant tell; every form of a collective.
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

FileNames
1 "model.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={4,8}
}

%inner_body (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %p = (s32[]{:T(128)}, bf16[4]{0:T(128)(2,1)}) parameter(0)
  %v = bf16[4]{0:T(128)(2,1)} get-tuple-element(%p), index=1
  %all-gather-start = (bf16[4]{0}, bf16[8]{0:S(1)}) all-gather-start(%v), replica_groups=[4,2]<=[8], dimensions={0}
  %all-gather-done = bf16[8]{0:S(1)} all-gather-done(%all-gather-start)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %half = bf16[4]{0} fusion(%all-gather-done), kind=kLoop, calls=%slice, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[]{:T(128)}, bf16[4]{0}) tuple(%i, %half)
}

%slice (x: bf16[8]) -> bf16[4] {
  %x = bf16[8]{0} parameter(0)
  ROOT %s = bf16[4]{0} slice(%x), slice={[0:4]}, backend_config={"estimated_cycles":"7"}
}

%inner_condition (p: (s32[], bf16[4])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4]{0:T(128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%outer_body (p: (s32[], bf16[4], s32[])) -> (s32[], bf16[4], s32[]) {
  %p = (s32[]{:T(128)}, bf16[4]{0}, s32[]{:T(128)}) parameter(0)
  %one = s32[]{:T(128)} constant(0)
  %v = bf16[4]{0} get-tuple-element(%p), index=1
  %limit = s32[]{:T(128)} get-tuple-element(%p), index=2
  %carry = (s32[]{:T(128)}, bf16[4]{0}) tuple(%one, %v)
  %while.2 = (s32[]{:T(128)}, /*index=1*/bf16[4]{0}) while(%carry), condition=%inner_condition, body=%inner_body
  %w = bf16[4]{0} get-tuple-element(%while.2), index=1
  ROOT %t = (s32[]{:T(128)}, bf16[4]{0}, s32[]{:T(128)}) tuple(%one, %w, %limit)
}

%outer_condition (p: (s32[], bf16[4], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4]{0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%p), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%yes (y: f32[4,8]) -> f32[4,8] {
  %y = f32[4,8]{1,0} parameter(0)
  ROOT %moved = f32[4,8]{1,0} collective-permute(%y), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
}

%no (n: f32[4,8]) -> f32[4,8] {
  ROOT %n = f32[4,8]{1,0} parameter(0)
}

ENTRY %main (x: f32[16,8], v: bf16[4], which: pred[]) -> (f32[4,8], bf16[4]) {
  %x = f32[16,8]{1,0} parameter(0)
  %v = bf16[4]{0} parameter(1)
  %which = pred[] parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %copy = s32[]{:T(128)} copy(%zero)
  %five = s32[]{:T(128)} constant(5)
  %carry = (s32[]{:T(128)}, bf16[4]{0}, s32[]{:T(128)}) tuple(%copy, %v, %five)
  %while.1 = (s32[], bf16[4]{0}, s32[]) while(%carry), condition=%outer_condition, body=%outer_body
  %w = bf16[4]{0} get-tuple-element(%while.1), index=1
  %fused = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter, backend_config={"estimated_cycles":"11"}
  %branch = f32[4,8]{1,0} conditional(%which, %fused, %fused), true_computation=%yes, false_computation=%no
  ROOT %out = (f32[4,8]{1,0}, bf16[4]{0}) tuple(%branch, %w)
}
"""


def test_collectives_of_a_program_by_kind_bytes_and_runs():
    found = {each.kind: each for each in costs.collectives(hlo.parse(TEXT))}
    assert found.keys() == {"all-gather", "reduce-scatter", "collective-permute"}
    gather = found["all-gather"]
    assert (gather.runs, gather.operand_bytes, gather.size, gather.sent_bytes) == (15, 8, 2, 15 * 8)
    scatter = found["reduce-scatter"]
    assert (scatter.runs, scatter.operand_bytes, scatter.size, scatter.sent_bytes) == (1, 512, 4, 384)
    permute = found["collective-permute"]
    assert (permute.runs, permute.sent_bytes) == (1, 128)
    mesh = {"fsdp": 4, "tensor": 2}
    axes = {kind: mesh_axes(each.groups, mesh) for kind, each in found.items()}
    assert axes == {"all-gather": ("tensor",), "reduce-scatter": ("fsdp",), "collective-permute": ("fsdp",)}


def test_an_instruction_may_go_on_in_further_lines():
    metadata = 'kernel_metadata={\n"a":"{\\"b\\": 4}"\n}'
    kernel = f'  %k = bf16[4]{{0}} custom-call(%v), frontend_attributes={{{metadata}}}, metadata={{op_name="x"}}\n'
    text = TEXT.replace("  %half =", kernel + "  %half =")
    program, plain = hlo.parse(text), hlo.parse(TEXT)
    [added] = [each for part in program.computations.values() for each in part.values() if each.name == "k"]
    assert added.attributes.endswith('}}, metadata={op_name="x"}')
    assert sum(map(len, program.computations.values())) == sum(map(len, plain.computations.values())) + 1


def test_cycles_are_those_of_what_runs_times_the_trips():
    assert costs.cycles(hlo.parse(TEXT)) == costs.Cycles(15 * 100 + 11, 0)


def test_kernels_count_by_their_own_estimate_times_the_trips():
    estimate = '{"flops":"4000","transcendentals":"9","bytes_accessed":"60","remote_bytes_transferred":"0"}'
    kernel = (
        '  %k = bf16[4]{0} custom-call(%v), custom_call_target="tpu_custom_call", backend_config='
        f'{{"custom_call_config":{{"body":"TU","cost_estimate":{estimate}}}}}\n'
    )
    text = TEXT.replace("  %half =", kernel + "  %half =")
    assert text != TEXT
    assert costs.kernels(hlo.parse(text)) == costs.Kernels(15 * 4000, 15 * 60)
    assert costs.kernels(hlo.parse(TEXT)) == costs.Kernels(0, 0)
    assert costs.cycles(hlo.parse(text)) == costs.cycles(hlo.parse(TEXT))


def test_what_costs_most_and_what_is_largest_come_with_their_source():
    text = TEXT.replace(
        "calls=%slice,", 'calls=%slice, metadata={op_name="jit(step)/jvp()/while/mul" stack_frame_id=1},'
    )
    program = hlo.parse(text)
    assert costs.costliest(program, 5) == (costs.Cost("jvp()/while/mul", 1500), costs.Cost("fusion", 11))
    assert costs.largest(program, 2) == (
        costs.Array("f32[4,8]", "fusion", 128),
        costs.Array("bf16[8]", "all-gather-start", 16),
    )


def test_a_loop_whose_limit_is_not_known_counts_once_and_is_told():
    unknown = TEXT.replace("constant(5)", "parameter(3)")
    assert costs.cycles(hlo.parse(unknown)) == costs.Cycles(3 * 100 + 11, 1)


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, x={1}", ((0, 1), (2, 3))),
        ("replica_groups={}, dimensions={0}", ((0, 1, 2, 3),)),
        ("channel_id=1", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4], x=1", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x={'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_replica_groups_in_every_form(text, expected):
    assert groups(text, 4) == expected


def test_replica_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="unknown form: somehow"):
        groups("replica_groups=somehow", 4)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)S(1)}", 24),
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("(s32[]{:T(128)}, pred[8]{0}, /*index=2*/u8[3])", 15),
        ("s4[8]{0}", 4),
        ("f8e4m3fn[8]{0}", 8),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_groups_along_two_axes_and_of_one_device():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_axes(((0, 1, 2, 3), (4, 5, 6, 7)), mesh) == ("fsdp", "tensor")
    assert mesh_axes(((0,), (1,)), mesh) == ()


LAYERS, ROWS, DIM = 5, 64, 32


@pytest.fixture(scope="module")
def compiled():
    """A loop over five layers whose weights are split over `fsdp` and used whole."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    rows, whole = NamedSharding(mesh, P(("fsdp", "tensor"))), NamedSharding(mesh, P())
    split = NamedSharding(mesh, P(None, "fsdp"))

    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), rows)

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]

    x = jax.ShapeDtypeStruct((ROWS, DIM), jnp.float32)
    weights = jax.ShapeDtypeStruct((LAYERS, DIM, DIM), jnp.float32)
    return jax.jit(run, in_shardings=(rows, split), out_shardings=rows).lower(x, weights).compile()


def test_weights_of_a_compiled_loop_are_gathered_once_a_layer(compiled):
    (gather,) = [each for each in costs.collectives(hlo.parse(compiled.as_text())) if each.kind == "all-gather"]
    assert mesh_axes(gather.groups, {"fsdp": 4, "tensor": 2}) == ("fsdp",)
    assert gather.runs * gather.operand_bytes == LAYERS * DIM * DIM * 4 // 4
    assert gather.sent_bytes == 3 * LAYERS * DIM * DIM * 4 // 4


def test_a_cpu_has_no_estimate(compiled):
    assert costs.cycles(hlo.parse(compiled.as_text())) == costs.Cycles(0, 0)


def test_a_loop_that_ends_by_what_it_computes_is_unknown():
    compiled = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 3.0, lambda x: x * 1.5, x)).lower(1.0).compile()
    assert costs.cycles(hlo.parse(compiled.as_text())).unknown_loops == 1
