"""The forward kernel for Hopper: a producer warp streams K/V blocks by TMA, consumer warpgroups of 64 rows multiply.

FlashAttention-3 (Shah et al., arXiv:2407.08608): the softmax of one block runs beside the products of the one before.
Rows, segments, windows and in-place results are those of `portable.forward`; keys are walked downwards from the
last one that the tile sees, block by block, and a block ends with its chunk (`pipeline.py`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..base2 import LN_2, LOG2_E
from ..segments.lookup import load_segment, tile_and_head
from .pipeline import (
    block_of,
    block_place,
    blocks_to_hide,
    hide,
    issue_scores,
    key_descriptor,
    load_block,
    load_queries,
    make_barriers,
    make_columns,
    make_stages,
    next_place,
    result_layout,
    row_places,
    specialize_warps,
    thread_barrier,
    top_block,
    wait_block,
    wait_turn,
)

# A score that no key has: finite, so that a row whose first blocks are all hidden gives no NaN; the first key it sees
# wipes out what these added. A power of two, so that scaled it is exact: a fused multiplication and subtraction of the
# maximum would leave a rounding error otherwise, and a huge one.
HIDDEN = gl.constexpr(-(2.0**100))


@gluon.jit
def _producer(
    k_ptr, v_ptr, k_smem, v_smem, k_full, v_full, empty, seen, kv_row, kv_chunk, slot_rows,
    SLOTS: gl.constexpr, HEAD_DIM: gl.constexpr, STRIDE_KT: gl.constexpr, STRIDE_VT: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr,
):  # fmt: skip
    chunk, start, blocks = top_block(seen, kv_chunk, SLOTS, BLOCK_N)
    if blocks > 0:
        # Descriptors are made while the consumers load their queries, that of V while the first keys are on their way.
        k_desc = key_descriptor(
            k_ptr, seen, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM, STRIDE_KT, BLOCK_N, BLOCK_D, HEADS_TOGETHER
        )
        slot, row = block_place(chunk, start, kv_row, kv_chunk, SLOTS)
        load_block(k_desc, [slot, row, 0], k_full, k_smem, 0, STAGES, BYTES)
        v_desc = key_descriptor(
            v_ptr, seen, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM, STRIDE_VT, BLOCK_N, BLOCK_D, HEADS_TOGETHER
        )
        head = 0
        for i in range(1, blocks * HEADS_TOGETHER):  # V runs one block behind K, in the order of use
            v_slot, v_row, v_head = slot, row, head
            chunk, start, head, slot, row = next_place(
                i, blocks, chunk, start, head, seen, kv_row, kv_chunk, SLOTS, BLOCK_N, HEADS_TOGETHER
            )
            wait_turn(empty, i, STAGES)
            load_block(k_desc, [slot, row, head * HEAD_DIM], k_full, k_smem, i, STAGES, BYTES)
            load_block(v_desc, [v_slot, v_row, v_head * HEAD_DIM], v_full, v_smem, i - 1, STAGES, BYTES)
        wait_turn(empty, blocks * HEADS_TOGETHER, STAGES)
        load_block(v_desc, [slot, row, head * HEAD_DIM], v_full, v_smem, blocks * HEADS_TOGETHER - 1, STAGES, BYTES)


@gluon.jit
def _consumer(
    warpgroup: gl.constexpr, values, SLOTS: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, SCALE_LOG2: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HEADS_TOGETHER: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    q_ptr, out_ptr, lse_ptr, q_smem, k_smem, v_smem, columns_smem, k_full, v_full, empty = values[0]
    row, q_row, q_len, diagonal, kv_len, seen, kv_chunk, first_kv_head, T = values[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    # At head_dim 64, with three and four consumers, the loop came out 6 to 11 % slower with the other layout.
    RESULT_LAYOUT: gl.constexpr = result_layout(BLOCK_D, out_ptr.dtype.element_ty) if BLOCK_D == 128 else O_LAYOUT
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    last_row = q_len * GROUP
    first = row + warpgroup * 64

    q_buffer = q_smem.index(warpgroup)
    q = load_queries(q_ptr, first, last_row, q_row, first_kv_head, GROUP, HEAD_DIM, BLOCK_D, STRIDE_QT, STRIDE_QH)
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
    limit = gl.minimum(diagonal + rows // GROUP + 1, kv_len)
    seen_by_all = gl.minimum(diagonal + first // GROUP + 1, kv_len)
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    for n in range(HEADS_TOGETHER):
        kv_head = first_kv_head + n
        q_buffer.store(q)
        hopper.fence_async_shared()
        thread_barrier()
        _, _, blocks = top_block(seen, kv_chunk, SLOTS, BLOCK_N)
        hidden, first_ragged = blocks_to_hide(blocks, seen_by_all, kv_chunk, SLOTS, BLOCK_N)
        # Blocks are numbered through all heads, as the producer brings them.
        begin, end = n * blocks, (n + 1) * blocks
        masked, ragged = begin + hidden, begin + first_ragged
        maximum = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)

        if blocks > 0:
            scores = issue_scores(q_buffer, k_smem, k_full, begin, zero, STAGES)
            scores = hopper.warpgroup_mma_wait(0, [scores])
            hopper.mbarrier.arrive(empty.index(begin % STAGES), count=1)
            scores, ragged = hide(
                scores, HIDDEN, columns_smem, limit, begin, end, masked, ragged, kv_chunk, SLOTS, BLOCK_N
            )
            maximum = gl.max(scores, 1) * SCALE_LOG2
            p = gl.exp2(scores * SCALE_LOG2 - maximum[:, None])
            total = gl.sum(p, 1)
            p_operand = gl.convert_layout(p.to(dtype), P_LAYOUT)
            for i in range(begin + 1, end):
                s_token = issue_scores(q_buffer, k_smem, k_full, i, zero, STAGES)
                wait_block(v_full, i - 1, STAGES)
                acc_token = hopper.warpgroup_mma(p_operand, block_of(v_smem, i - 1, STAGES), acc, is_async=True)
                scores = hopper.warpgroup_mma_wait(1, [s_token])
                scores, ragged = hide(
                    scores, HIDDEN, columns_smem, limit, i, end, masked, ragged, kv_chunk, SLOTS, BLOCK_N
                )
                new_maximum = gl.maximum(maximum, gl.max(scores, 1) * SCALE_LOG2)
                rescale = gl.exp2(maximum - new_maximum)
                p = gl.exp2(scores * SCALE_LOG2 - new_maximum[:, None])
                total = total * rescale + gl.sum(p, 1)
                maximum = new_maximum
                # Already complete: a branch that keeps the assembler from hoisting the next wait above the softmax.
                wait_block(v_full, i - 1, STAGES)
                acc = hopper.warpgroup_mma_wait(0, [acc_token])
                hopper.mbarrier.arrive(empty.index(i % STAGES), count=1)  # K of block i, V of the one before
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
                p_operand = gl.convert_layout(p.to(dtype), P_LAYOUT)
            wait_block(v_full, end - 1, STAGES)
            acc = hopper.warpgroup_mma(p_operand, block_of(v_smem, end - 1, STAGES), acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, [acc])

        if HEADS_TOGETHER > 1:  # the next queries come while these results leave
            q = load_queries(
                q_ptr,
                first,
                gl.where(n < HEADS_TOGETHER - 1, last_row, 0),
                q_row,
                kv_head + 1,
                GROUP,
                HEAD_DIM,
                BLOCK_D,
                STRIDE_QT,
                STRIDE_QH,
            )
        # In base 2; HIDDEN is the maximum of rows that see no key.
        blind = maximum < HIDDEN * SCALE_LOG2 * 0.5
        lse2 = gl.where(blind, float("-inf"), maximum + gl.log2(total))
        factor = gl.where(blind, 0.0, 1.0 / total)
        if kv_len < 0:  # impossible tables poison
            lse2 = lse2 + float("nan")
            factor = factor + float("nan")
        statistics = (kv_head * GROUP + rows % GROUP) * T + q_row + rows // GROUP
        inside = rows < last_row
        out_rows, places = row_places(first, q_row, kv_head, HEADS, GROUP, HEAD_DIM, RESULT_LAYOUT)
        out_dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, RESULT_LAYOUT))
        out_mask = (out_rows < last_row)[:, None] & (out_dims < HEAD_DIM)[None, :]
        out_ptrs = out_ptr + places[:, None] + out_dims[None, :]
        if ACCUMULATE:
            before = gl.load(lse_ptr + statistics, mask=inside, other=0.0) * LOG2_E
            largest = gl.maximum(lse2, before)
            largest = gl.where(largest == float("-inf"), 0.0, largest)
            now, then = gl.exp2(lse2 - largest), gl.exp2(before - largest)
            sums = now + then
            none = sums == 0.0
            sums = gl.where(none, 1.0, sums)
            lse2 = gl.where(none, float("-inf"), largest + gl.log2(sums))
            factor = factor * (now / sums)
            then = gl.convert_layout(then / sums, gl.SliceLayout(1, RESULT_LAYOUT))
        out = acc * gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))[:, None]
        if ACCUMULATE:
            before = gl.load(out_ptrs, mask=out_mask, other=0.0)
            out = gl.convert_layout(out, RESULT_LAYOUT) + before * then[:, None]
        gl.store(lse_ptr + statistics, lse2 * LN_2, mask=inside)
        gl.store(out_ptrs, gl.convert_layout(out.to(out_ptr.dtype.element_ty), RESULT_LAYOUT), mask=out_mask)


@gluon.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def attention_forward_hopper(
    q_ptr, k_ptr, v_ptr, segments_ptr, into_out_ptr, into_lse_ptr, n_segments, T, slot_rows, first_kv_head,
    out_ptr, lse_ptr,
    SLOTS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    TILES_TOGETHER: gl.constexpr, HEADS_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    tile, heads = tile_and_head(KV_HEADS // HEADS_TOGETHER, TILES_TOGETHER)
    window_head = heads * HEADS_TOGETHER
    row, q_row, q_len, diagonal, kv_len, kv_row, kv_chunk = load_segment(
        segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M
    )
    if row >= q_len * GROUP:
        return
    if ACCUMULATE and kv_len == 0:
        return
    last_token = gl.minimum(row + BLOCK_M - 1, q_len * GROUP - 1) // GROUP
    seen = gl.maximum(gl.minimum(diagonal + last_token + 1, kv_len), 0)
    kv_head = (first_kv_head + window_head).to(gl.int64)
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    WARPGROUPS: gl.constexpr = BLOCK_M // 64
    BYTES: gl.constexpr = BLOCK_N * BLOCK_D * 2
    SCALE_LOG2: gl.constexpr = SOFTMAX_SCALE * LOG2_E
    Q_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    head = window_head.to(gl.int64)
    k_ptr += head * STRIDE_KH
    v_ptr += head * STRIDE_VH
    q_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS, 64, BLOCK_D], Q_SMEM)
    k_smem, k_full = make_stages([STAGES, 1, BLOCK_N, BLOCK_D], dtype, 1)
    v_smem, v_full = make_stages([STAGES, 1, BLOCK_N, BLOCK_D], dtype, 1)
    columns_smem = make_columns(BLOCK_N)
    empty = make_barriers(STAGES, WARPGROUPS)
    hopper.fence_async_shared()
    # A tuple bound to a name turns its constexprs into tensors: those stay outside.
    values = (
        (q_ptr, out_ptr, lse_ptr, q_smem, k_smem, v_smem, columns_smem, k_full, v_full, empty),
        (row, q_row, q_len, diagonal, kv_len, seen, kv_chunk, kv_head, T),
    )
    specialize_warps(
        _consumer, (
            values, SLOTS, HEADS, GROUP, HEAD_DIM, SCALE_LOG2, STRIDE_QT, STRIDE_QH, BLOCK_N, BLOCK_D, STAGES,
            HEADS_TOGETHER, ACCUMULATE,
        ), WARPGROUPS,
        (_producer, (
            k_ptr, v_ptr, k_smem, v_smem, k_full, v_full, empty, seen, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM,
            STRIDE_KT, STRIDE_VT, BLOCK_N, BLOCK_D, STAGES, BYTES, HEADS_TOGETHER,
        ), 4),
    )  # fmt: skip
