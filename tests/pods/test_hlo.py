"""The reader of HLO on a program whose cost is counted by hand."""

import pytest

from diq_jax.pods import hlo

# A loop of 3 over a product (8, 4) x (4, 16) and an all-reduce of its 512 bytes between 4 chips.
PROGRAM = """
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} constant({...})
  %w = f32[4,16]{1,0} constant({...})
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
backend_config={"estimated_cycles":"100"}
  %z = f32[8,16]{1,0} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %z)
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (start: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %start = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    cost = hlo.read(PROGRAM)
    assert cost.loops == [3] and cost.unknown_loops == 0
    assert cost.flops == 3 * 2 * 8 * 4 * 16  # multiply and add
    assert cost.cycles == 3 * 100
    assert dict(cost.collectives) == {("all-reduce", 4): [3, 3 * 8 * 16 * 4]}
    assert cost.by_kind() == {"all-reduce": [3, round(3 * 512 / 2**20, 1)]}
    # A ring passes 3/4 of the bytes twice: 2 * 0.75 * 1,536 bytes at 1,000 a second.
    assert cost.link_seconds(1000) == pytest.approx(2.304)


def test_an_unrolled_loop_counts_its_stride():
    """A counter that goes to 8 by 2 runs four times."""
    unrolled = PROGRAM.replace("constant(3)", "constant(8)").replace("s32[]", "u32[]")
    unrolled = unrolled.replace("tuple(%i, %z)", "tuple(%next, %z)").replace(
        "  %x = f32[8,4]",
        "  %two = u32[] constant(2)\n  %next = u32[] add(%i, %two)\n  %x = f32[8,4]",
    )
    cost = hlo.read(unrolled)
    assert cost.loops == [4] and cost.cycles == 4 * 100


def test_a_collective_in_pieces_counts_once():
    """Pieces inside the fusions that overlap it are one collective of its channel."""
    pieces = PROGRAM.replace(
        "replica_groups={{0,1,2,3}}",
        'channel_id=7, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}',
    ).replace(
        "  ROOT %loop =",
        "  %v = f32[8,16]{1,0} constant({...})\n  %first = f32[8,16]{1,0} all-reduce(%v), "
        'channel_id=7, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}\n'
        "  ROOT %loop =",
    )
    assert dict(hlo.read(pieces).collectives) == {("all-reduce", 4): [1, 8 * 16 * 4]}


def test_a_slice_of_a_sum_is_scattered():
    """A fusion that keeps two of the eight rows of a sum of four chips: 128 of 512 bytes stay."""
    fused = PROGRAM.replace(
        "%body (state",
        """%scattered (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %summed = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%summed, %zero, %zero), dynamic_slice_sizes={2,16}
}

%body (state""",
    ).replace(
        "  %z = f32[8,16]{1,0} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add",
        "  %z = f32[2,16]{1,0} fusion(%y), kind=kCustom, calls=%scattered",
    )
    cost = hlo.read(fused)
    assert dict(cost.collectives) == {("reduce-scatter", 4): [3, 3 * 128]}
    # A ring passes three pieces of 128 bytes.
    assert cost.link_seconds(1000) == pytest.approx(3 * 3 * 0.128)


def test_a_convolution_counts_no_padding():
    """A window of 3 over 4 places with one of padding on each side has 2 + 3 + 3 + 2 products, for
    each of 2 batches, 5 input and 7 output features.
    """
    line = (
        "  %c = f32[2,4,7]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, "
        "dim_labels=b0f_0io->b0f"
    )
    text = "\n".join(
        [
            "ENTRY %main (x: f32[2,4,5], w: f32[3,5,7]) -> f32[2,4,7] {",
            "  %x = f32[2,4,5]{2,1,0} parameter(0)",
            "  %w = f32[3,5,7]{2,1,0} parameter(1)",
            line,
            "}",
        ]
    )
    assert hlo.read(text).flops == 2 * (2 + 3 + 3 + 2) * 2 * 5 * 7
