"""Schedules of programs are read for transfers beside kernels."""

from bench.lab.transfers import beside_kernels

SCHEDULE = """
  %all-gather-start.1 = (bf16[8,2]{1,0}, bf16[32,2]{1,0}) all-gather-start(%slice.1), channel_id=1
  %all-gather-done.1 = bf16[32,2]{1,0} all-gather-done(%all-gather-start.1)
  %all-gather-start.2 = (bf16[8,2]{1,0}, bf16[32,2]{1,0}) all-gather-start(%slice.2), channel_id=2
  %call.0 = (s32[3,14]{1,0}) custom-call(%x), metadata={op_name="jit(f)/zigzag::build_segments/triton_kernel_call"}
  %reduce-scatter-start = ((f32[8]{0}), (f32[2]{0})) reduce-scatter-start(%a, %b), channel_id=3
  %call.1 = (bf16[8,4]{1,0}) custom-call(%q, %k), metadata={op_name="jit(f)/zigzag::attention_forward_hopper/ffi_call"}
  %all-gather-done.2 = bf16[32,2]{1,0} all-gather-done(%all-gather-start.2)
  %reduce-scatter-done = (f32[2]{0}) reduce-scatter-done(%reduce-scatter-start)
  %call.2 = (bf16[8,4]{1,0}) custom-call(%q, %k), metadata={op_name="jit(f)/zigzag::backward_dq/triton_kernel_call"}
"""


def test_transfers_in_flight_beside_each_kernel():
    assert [*beside_kernels(SCHEDULE)] == [
        ("none", ["all-gather"]),
        ("attention_forward", ["all-gather", "reduce-scatter"]),
        ("backward_dq", []),
    ]
