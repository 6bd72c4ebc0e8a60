"""The fused backward for Hopper: the dK/dV kernel also adds each block's dQ to a float32 array, in no fixed order.

Scores are computed once instead of twice, but the same inputs do not give the same bits. dS goes through shared memory,
where both consumers' keys meet: each multiplies half of head_dim, and the copy engine adds its half of the block to
`sums`, which `clear_sums` made zero and `finish_dq` turns into dQ.
"""

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..base2 import LOG2_E
from ..segments.lookup import load_sequence, load_sequence_rows, tables_are_invalid, tile_and_head
from .dkdv import _block_tokens, _copy_keys, _half, _key_rows, _producer, _row_descriptor
from .pipeline import (
    block_of,
    issue_scores,
    make_barriers,
    make_stages,
    result_layout,
    specialize_warps,
    store_tile,
    thread_barrier,
)


@builtin
def _add_to_global(desc, place, buffer, _semantic=None):
    """Add `buffer` to the box of `desc` at `place`, by the copy engine, asynchronously."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, place, buffer.handle)


@gluon.jit
def _block_place(
    i, late_row, late_first, late_whole, late_masked, early_first, early_whole, early_masked, TOKENS: gl.constexpr,
    PARTS: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """(row of the sequence, head of the group) where block `i` of `_producer` begins.

    The late half begins at row `late_row`, the early one at 0; the rest is from `_half`: blocks that are whole, masked.
    """
    number = i // PARTS
    whole = late_whole + early_whole
    late = gl.where(number < late_whole, late_masked + number, number - whole)
    early = gl.where(number < whole, early_masked + number - late_whole, number - whole - late_masked)
    is_late = (number < late_whole) | ((number >= whole) & (number < whole + late_masked))
    late_begin, _ = _block_tokens(late_first, late, TOKENS)
    early_begin, _ = _block_tokens(early_first, early, TOKENS)
    return gl.where(is_late, late_row + late_begin, early_begin), i % PARTS * PACK


@gluon.jit
def _block(
    warpgroup: gl.constexpr, scores, dk, dv, dq, k_smem, v, zero, keys, q_smem, dout_smem, lse2_smem, delta_smem,
    limit_smem, ds_smem, dout_full, ds_full, i, whole, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    SCALE_LOG2: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What block `i`, whose scores are there, adds to dV, to dK, and to half of the columns of dQ: the products are
    under way, in this order."""
    R_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = v.dtype
    HALF_D: gl.constexpr = v.shape[1] // 2
    stage = i % STAGES
    dp = issue_scores(v, dout_smem, dout_full, i, zero, STAGES)
    lse2 = lse2_smem.index(stage).load(R_LAYOUT)
    p = gl.exp2(scores * SCALE_LOG2 - lse2[None, :])
    delta = delta_smem.index(stage).load(R_LAYOUT)
    dp = hopper.warpgroup_mma_wait(0, [dp]) - delta[None, :]
    if i >= whole:
        limit = limit_smem.index(stage).load(R_LAYOUT)
        seen = keys[:, None] < limit[None, :]
        p = gl.where(seen, p, 0.0)
        dp = gl.where(seen, dp, 0.0)  # zero times what is not finite would reach dQ of rows that do not see the key
    dv = hopper.warpgroup_mma(
        gl.convert_layout(p.to(dtype), P_LAYOUT), block_of(dout_smem, i, STAGES), dv, is_async=True
    )
    ds = (p * dp).to(dtype)
    ds_operand = gl.convert_layout(ds, P_LAYOUT)
    # Two buffers a consumer: whoever has seen dS of block i - 1 knows that the other has left that of block i - 2.
    both = (i & 1) * 2
    ds_smem.index(both + warpgroup).store(ds)
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(ds_full, count=1)
    dk = hopper.warpgroup_mma(ds_operand, block_of(q_smem, i, STAGES), dk, is_async=True)
    hopper.mbarrier.wait(ds_full, i & 1)
    k_upper = k_smem.index(0).slice(warpgroup * HALF_D, HALF_D, 1)
    k_lower = k_smem.index(1).slice(warpgroup * HALF_D, HALF_D, 1)
    dq = hopper.warpgroup_mma(ds_smem.index(both).permute((1, 0)), k_upper, dq, use_acc=False, is_async=True)
    dq = hopper.warpgroup_mma(ds_smem.index(both + 1).permute((1, 0)), k_lower, dq, is_async=True)
    return dk, dv, dq


@gluon.jit
def _hand_over_dq(dq_token, dq_buffer, dq_full, dq_empty, i):
    """Half of dQ of block `i`, the last product but one, for `_writer`."""
    SHAPE: gl.constexpr = [dq_buffer.shape[0] * dq_buffer.shape[1], dq_buffer.shape[2]]
    hopper.mbarrier.wait(dq_empty, (i & 1) ^ 1)
    dq = hopper.warpgroup_mma_wait(1, [dq_token])
    dq_buffer.reshape(SHAPE).store(dq)
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(dq_full, count=1)


@gluon.jit
def _writer(
    sums_ptr, kv_head, sequence_row, sequence_rows, dq_smem, dq_full, dq_empty, blocks, late_row, late_first,
    late_whole, late_masked, early_first, early_whole, early_masked, HEADS: gl.constexpr, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr, PACK: gl.constexpr, HALF_D: gl.constexpr,
):  # fmt: skip
    """Let the copy engine add both halves of dQ of every block to the sums."""
    sums_desc = _row_descriptor(
        sums_ptr, kv_head, sequence_row, sequence_rows, GROUP, HEAD_DIM, HEADS * HEAD_DIM, HEAD_DIM,
        [TOKENS, PACK, HALF_D],
    )  # fmt: skip
    for i in range(blocks):
        row, head = _block_place(
            i,
            late_row,
            late_first,
            late_whole,
            late_masked,
            early_first,
            early_whole,
            early_masked,
            TOKENS,
            PARTS,
            PACK,
        )
        hopper.mbarrier.wait(dq_full, i & 1)
        _add_to_global(sums_desc, [row, head, 0], dq_smem.index(0))
        _add_to_global(sums_desc, [row, head, HALF_D], dq_smem.index(1))
        hopper.tma.store_wait(0)  # until it has read them
        hopper.mbarrier.arrive(dq_empty, count=1)


@gluon.jit
def _consumer(
    warpgroup: gl.constexpr, values, SLOTS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    SOFTMAX_SCALE: gl.constexpr, STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr,
    STRIDE_VH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    k_ptr, v_ptr, dk_ptr, dv_ptr, k_smem, v_smem, ds_smem, dq_smem, ds_full, dq_full, dq_empty = values[0]
    q_smem, dout_smem, lse2_smem, delta_smem, limit_smem, q_full, dout_full, empty = values[1]
    first_key, n_keys, kv_row, kv_chunk, slot_rows, window_head, poison, blocks, whole = values[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16]
    )
    HALF_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D // 2, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=D_LAYOUT, k_width=2)
    SCALE_LOG2: gl.constexpr = SOFTMAX_SCALE * LOG2_E
    first = first_key + warpgroup * 64
    k = k_smem.index(warpgroup)
    v = v_smem.index(warpgroup)
    head = window_head.to(gl.int64)
    k_ptr += head * STRIDE_KH
    v_ptr += head * STRIDE_VH
    _copy_keys(k_ptr, v_ptr, k, v, first, n_keys, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM, STRIDE_KT, STRIDE_VT)
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    thread_barrier()

    keys = first + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
    zero = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
    dk = gl.zeros([64, BLOCK_D], gl.float32, D_LAYOUT)
    dv = gl.zeros([64, BLOCK_D], gl.float32, D_LAYOUT)
    no_dq = gl.zeros([BLOCK_M, BLOCK_D // 2], gl.float32, HALF_LAYOUT)
    dq_buffer = dq_smem.index(warpgroup)
    if blocks > 0:
        # The scores of the next block are queued behind dQ of this one and run while that is written out.
        scores = issue_scores(k, q_smem, q_full, 0, zero, STAGES)
        for i in range(blocks):
            scores = hopper.warpgroup_mma_wait(0, [scores])
            dk, dv, dq_token = _block(
                warpgroup, scores, dk, dv, no_dq, k_smem, v, zero, keys, q_smem, dout_smem, lse2_smem, delta_smem,
                limit_smem, ds_smem, dout_full, ds_full, i, whole, S_LAYOUT, P_LAYOUT, SCALE_LOG2, STAGES,
            )  # fmt: skip
            dk, dv = hopper.warpgroup_mma_wait(2, [dk, dv])
            hopper.mbarrier.arrive(empty.index(i % STAGES), count=1)
            # Behind the last block this multiplies whatever is there; nobody reads the product.
            hopper.mbarrier.wait(q_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < blocks)
            q = block_of(q_smem, i + 1, STAGES)
            scores = hopper.warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            _hand_over_dq(dq_token, dq_buffer, dq_full, dq_empty, i)
        scores = hopper.warpgroup_mma_wait(0, [scores])

    RESULT_LAYOUT: gl.constexpr = result_layout(BLOCK_D, dk_ptr.dtype.element_ty)
    keys = first + gl.arange(0, 64, gl.SliceLayout(1, RESULT_LAYOUT))
    rows = (_key_rows(keys, kv_row, kv_chunk, slot_rows, SLOTS) * KV_HEADS + window_head) * HEAD_DIM
    valid = gl.where(poison, float("nan"), 1.0)
    store_tile(dv_ptr, rows, keys < n_keys, dv * valid, HEAD_DIM, ACCUMULATE)
    store_tile(dk_ptr, rows, keys < n_keys, dk * (valid * SOFTMAX_SCALE), HEAD_DIM, ACCUMULATE)


@gluon.jit(do_not_specialize=["n_sequences", "T", "slot_rows", "first_kv_head"])
def backward_fused_hopper(
    q_ptr, k_ptr, v_ptr, dout_ptr, delta_ptr, lse2_ptr, sequences_ptr, into_dk_ptr, into_dv_ptr, into_sums_ptr,
    n_sequences, T, slot_rows, first_kv_head, dk_ptr, dv_ptr, sums_ptr,
    SLOTS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr,
    STRIDE_DOT: gl.constexpr, STRIDE_DOH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TILES_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """As `backward_dkdv_hopper`, and adds dQ, not yet scaled, to `sums [T, HEADS, HEAD_DIM]` float32. BLOCK_M is 64."""
    POWER: gl.constexpr = GROUP & -GROUP
    PACK: gl.constexpr = POWER if POWER < BLOCK_M else BLOCK_M
    TOKENS: gl.constexpr = BLOCK_M // PACK
    PARTS: gl.constexpr = GROUP // PACK
    tile, window_head = tile_and_head(KV_HEADS, TILES_TOGETHER)
    halves_ptr, first_key, n_keys, kv_row, kv_chunk, poison = load_sequence(
        sequences_ptr, n_sequences, tile, slot_rows, SLOTS, BLOCK_N
    )
    if first_key >= n_keys:
        return

    sequence_row, sequence_rows = load_sequence_rows(halves_ptr)
    late_row, _, _, late_first, late_blocks, late_masked = _half(
        halves_ptr, 0, first_key, n_keys, CAUSAL, BLOCK_N, TOKENS
    )
    _, _, _, early_first, early_blocks, early_masked = _half(halves_ptr, 1, first_key, n_keys, CAUSAL, BLOCK_N, TOKENS)
    blocks = (late_blocks + early_blocks) * PARTS
    # Behind the last key dS has to be zero, or 0 * infinity would reach dQ.
    whole = gl.where(first_key + BLOCK_N > n_keys, 0, blocks - (late_masked + early_masked) * PARTS)
    kv_head = (first_kv_head + window_head).to(gl.int64)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    KEY_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    DS_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], dtype)
    DQ_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, PACK, BLOCK_D // 2], gl.float32)
    STATISTIC_SMEM: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse2_ptr += window_head.to(gl.int64) * T * GROUP
    delta_ptr += window_head.to(gl.int64) * T * GROUP
    k_smem = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], KEY_SMEM)
    v_smem = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], KEY_SMEM)
    ds_smem = gl.allocate_shared_memory(dtype, [4, 64, BLOCK_M], DS_SMEM)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, TOKENS, PACK, BLOCK_D // 2], DQ_SMEM)
    q_smem, q_full = make_stages([STAGES, TOKENS, PACK, BLOCK_D], dtype, 2)
    dout_smem, dout_full = make_stages([STAGES, TOKENS, PACK, BLOCK_D], dtype, 2)
    empty = make_barriers(STAGES, 2)
    lse2_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], STATISTIC_SMEM)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], STATISTIC_SMEM)
    limit_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], STATISTIC_SMEM)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    ds_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    dq_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    dq_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    hopper.mbarrier.init(ds_full, 2)
    hopper.mbarrier.init(dq_full, 2)
    hopper.mbarrier.init(dq_empty, 1)
    hopper.fence_async_shared()
    values = (
        (k_ptr, v_ptr, dk_ptr, dv_ptr, k_smem, v_smem, ds_smem, dq_smem, ds_full, dq_full, dq_empty),
        (q_smem, dout_smem, lse2_smem, delta_smem, limit_smem, q_full, dout_full, empty),
        (first_key, n_keys, kv_row, kv_chunk, slot_rows, window_head, poison, blocks, whole),
    )
    specialize_warps(
        _consumer, (
            values, SLOTS, KV_HEADS, HEAD_DIM, SOFTMAX_SCALE, STRIDE_KT, STRIDE_KH, STRIDE_VT, STRIDE_VH, BLOCK_M,
            BLOCK_D, STAGES, ACCUMULATE,
        ), 2,
        (_producer, (
            q_ptr, dout_ptr, lse2_ptr, delta_ptr, halves_ptr, q_smem, dout_smem, lse2_smem, delta_smem, limit_smem,
            q_full, dout_full, empty, first_key, n_keys, kv_head, sequence_row, sequence_rows, T, CAUSAL, GROUP,
            HEAD_DIM, STRIDE_QT, STRIDE_QH, STRIDE_DOT, STRIDE_DOH, PACK, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
        ), 1),
        (_writer, (
            sums_ptr, kv_head, sequence_row, sequence_rows, dq_smem, dq_full, dq_empty, blocks,
            late_row - sequence_row, late_first, late_blocks - late_masked, late_masked, early_first,
            early_blocks - early_masked, early_masked, HEADS, GROUP, HEAD_DIM, TOKENS, PARTS, PACK, BLOCK_D // 2,
        ), 1),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def clear_sums(
    q_ptr,  # [T, heads, head_dim]: where to work, not read
    T,
    sums_ptr,  # [T, heads, head_dim] float32
    ROW: tl.constexpr,  # heads * head_dim
    BLOCK: tl.constexpr,
):
    """Zero for `backward_fused_hopper` to add to. Grid: blocks of elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums_ptr + places, 0.0, mask=places < T.to(tl.int64) * ROW)


@triton.jit(do_not_specialize=["n_segments", "T"])
def finish_dq(
    sums_ptr,  # [T, heads, head_dim] float32
    segments_ptr,
    n_segments,
    T,
    dq_ptr,  # [T, heads, head_dim]
    ROW: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dQ from the sums of `backward_fused_hopper`; NaN if the tables are impossible, as in `load_segment`."""
    impossible = tables_are_invalid(segments_ptr, n_segments, T)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < T.to(tl.int64) * ROW
    dq = tl.load(sums_ptr + places, mask=inside) * tl.where(impossible, float("nan"), SOFTMAX_SCALE)
    tl.store(dq_ptr + places, dq.to(dq_ptr.dtype.element_ty), mask=inside)
