"""The reader of compiled programs: loops, branches, products, collectives and their axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tools.aot import count
from tools.aot.hlo import Op, Program

MESH = {"replica": 1, "data": 4, "expert": 2, "seq": 1, "model": 1}
LINES = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, /*index=2*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %limit = s32[] get-tuple-element(%p), index=2
  %w = f32[16,16]{1,0} constant({...})
  %y = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(f)/jvp(B)/layers/ffn_0/dot_general" stack_frame_id=3}
  %r = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(f)/checkpoint/rematted_computation/layers/ffn_0/dot_general"}
  %g = f32[8,64]{1,0} all-gather(%y), channel_id=7, replica_groups=mesh['replica'=1,'data'=4,'expert'=2,'seq'=1,'model'=1] {'data'}, dimensions={1}
  ROOT %t = (s32[], f32[8,16], s32[]) tuple(%i, %y, %limit)
}

%condition (p: (s32[], f32[8,16], s32[])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%slow (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16] parameter(0)
  %w = f32[16,16]{1,0} constant({...})
  ROOT %y = f32[8,16]{1,0} convolution(%p, %w), dim_labels=bf_io->bf, metadata={op_name="a/layers/experts/cond/dot_general"}
}

%quick (p: f32[8,16]) -> f32[8,16] {
  ROOT %p = f32[8,16] parameter(0)
}

ENTRY %main (a: f32[8,16], n: s32[]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = s32[] constant(1)
  %six = s32[] constant(6)
  %copied = s32[] copy(%six)
  %state = (s32[], f32[8,16], s32[]) tuple(%one, %a, %copied)
  %loop = (s32[], f32[8,16], s32[]) while(%state), condition=%condition, body=%body
  %data = (s32[], f32[8,16], s32[]) tuple(%one, %a, %n)
  %other = (s32[], f32[8,16], s32[]) while(%data), condition=%condition, body=%body
  %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  %c = f32[8,16] conditional(%n, %out, %out), branch_computations={%quick, %slow}, metadata={op_name="SCOPE"}
  %s = (f32[4,4], u32[], token[]) send(%out, %n), channel_id=9, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %sum = f32[8,16]{1,0} all-reduce(%c), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%quick
}
"""


def counted(scope="jit(f)/cond"):
    return count.count(Program(LINES.replace("SCOPE", scope)), MESH)


def test_loops_multiply_and_data_does_not():
    program = Program(LINES)
    assert program.trips("main", program.computations["main"]["loop"]) == 5  # from 1 to 6, both through the tuple
    assert program.trips("main", program.computations["main"]["other"]) == 1 and program.unknown == {"other"}
    found = counted()
    product = 2 * 8 * 16 * 16
    assert found.flops["dense"] == 6 * product and found.remat == 6 * product and found.unknown_loops == 1


def test_of_a_conditional_the_experts_slow_path_does_not_run():
    product = 2 * 8 * 16 * 16
    assert counted("jit(f)/cond").flops["experts"] == product
    assert "experts" not in counted("jit(f)/layers/experts/cond").flops


def test_bytes_on_the_wire_and_their_axes():
    found = {(one.kind, one.axes): one for one in counted().collectives}
    gather, reduce, send = found["all-gather", "data"], found["all-reduce", "expert"], found["send", "dcn"]
    assert (gather.times, gather.sent) == (6, 8 * 64 * 4 * 3 / 4)
    assert (reduce.times, reduce.sent) == (1, 2 * 8 * 16 * 4 / 2)
    assert send.sent == 4 * 4 * 4


@pytest.mark.parametrize("text,axes", [
    ("replica_groups={{0,2,4,6},{1,3,5,7}}", "data"), ("replica_groups=[4,2]<=[8]", "expert"), ("replica_groups=[2,4]<=[4,2]T(1,0)", "data"),
    ("replica_groups=[1,8]<=[8]", "data+expert"), ("source_target_pairs={{0,1},{1,0}}", "expert"), ("replica_groups={{0},{1}}", "none"),
    ("replica_groups=mesh['data'=4,'expert'=2] {'expert'}", "expert"),
])
def test_groups_in_every_notation(text, axes):
    assert count.axes_of(count.groups_of(Op("x", "f32[1]", "all-reduce", "", text), MESH), MESH) == axes


def test_a_group_over_slices_leaves_them():
    assert count.axes_of([0, 4], MESH, slice_size=4) == "dcn" and count.axes_of([0, 1], MESH, slice_size=4) == "expert"


def test_an_operation_may_have_several_lines():
    line = '%k = f32[8,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n"x":"{}"\n}}, metadata={op_name="K"}'
    whole = count.count(Program(LINES.replace("SCOPE", "jit(f)/cond")), MESH)
    program = Program(LINES.replace("SCOPE", "jit(f)/cond").replace("  %n = s32[] parameter(1)", f"  %n = s32[] parameter(1)\n  {line}"))
    assert program.computations["main"]["k"].op_name == "K"
    found = count.count(program, MESH)
    assert found.flops == whole.flops and found.custom_calls == {"k": 1}


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule m\n")


@pytest.mark.parametrize("window", [dict(window_strides=(2,), padding=((3, 1),)), dict(window_strides=(1,), padding=((2, 2),), rhs_dilation=(2,)),
                                    dict(window_strides=(7,), padding=((0, 0),), lhs_dilation=(8,))])
def test_window_positions_are_those_that_read_something(window):
    source, kernel = 8, 8 if "lhs_dilation" in window else 3
    x, w = jnp.ones((1, source, 1)), jnp.ones((kernel, 1, 1))
    made = jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHC", "HIO", "NHC"), **window)
    given = {"stride": window["window_strides"][0], "pad": window["padding"][0], "lhs_dilate": window.get("lhs_dilation", (1,))[0],
             "rhs_dilate": window.get("rhs_dilation", (1,))[0]}
    assert count.window_pairs(source, kernel, made.shape[1], given) == float(jnp.sum(made))  # of ones: every product adds one


def test_a_real_program_with_loops_and_collectives():
    """Counted by hand, on whatever this machine compiles for."""
    mesh = jax.make_mesh((4, 2), ("data", "expert"))

    def local(x, w):
        def body(x, w):
            full = jax.lax.all_gather(w, "data", axis=0, tiled=True)
            return jnp.einsum("bd,df->bf", x, full), None

        out, _ = jax.lax.scan(body, x, w)
        return jax.lax.psum(out, "expert")

    fn = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(None, "data")), out_specs=P("data"), check_vma=False))
    place = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P(*spec)))
    x, w = place((16, 32), "data"), place((6, 32, 32), None, "data")
    found = count.count(Program(fn.lower(x, w).compile().as_text()), {"data": 4, "expert": 2})
    assert sum(found.flops.values()) == 6 * 2 * 4 * 32 * 32
    sent = {(one.kind, one.axes): one.sent * one.times for one in found.collectives}
    assert sent == {("all-gather", "data"): 6 * 32 * 32 * 4 * 3 / 4, ("all-reduce", "expert"): 2 * 4 * 32 * 4 / 2}
    assert np.isclose(found.remat, 0)
