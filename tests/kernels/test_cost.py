"""The sum over simulated operations: loops, equal operations, and what a profile leaves out."""

from kernels.rvq_lookup import cost

PROGRAM = """HloModule m
%body.1 (p: f32[2]) -> f32[2] {
  %p = f32[2] parameter(0)
  %dot.3 = f32[2] fusion(%p), kind=kLoop
  ROOT %add.4 = f32[2] add(%dot.3, %p)
}
%other.2 (p: f32[2]) -> f32[2] {
  ROOT %mul.5 = f32[2] multiply(%p, %p)
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %loop = f32[2] while(%x), condition=%cond.9, body=%body.1
  ROOT %gather.6 = f32[2] fusion(%loop), calls=%other.2
}
"""


def _profile(name, cost, equal=""):
    return f'hlo_op_estimate {{\n hlo_op_name: "{name}"\n estimated_cycles: {cost}\n {equal}\n}}'


def test_operations_of_a_loop_count_once_a_trip():
    profiles = [_profile("dot.3", 100, "num_equivalent_hlos: 2"), _profile("add.4", 10), _profile("gather.6", 7), _profile("mul.5", 1)]
    assert cost.cycles(PROGRAM, profiles, trips=4) == 4 * (100 * 2 + 10) + 7 + 1
