"""The dQ kernel for Hopper: each of two consumer warpgroups owns 64 query rows and keeps their dQ in registers.

Rows, segments, windows and in-place results are those of `portable.dq`. A producer warpgroup streams K and
V block by block, downwards as in the forward kernel. Boxes are clipped to the rows of the sequence in each slot: what
lies behind is read as zero, never as another sequence's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..base2 import LOG2_E
from ..segments.lookup import load_segment, tile_and_head
from .pipeline import (
    SINCE_3_8,
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
    opaque,
    result_layout,
    row_places,
    specialize_warps,
    store_tile,
    thread_barrier,
    top_block,
    wait_block,
    wait_turn,
)


@gluon.jit
def _producer(
    k_ptr, v_ptr, k_smem, v_smem, k_full, v_full, empty, seen, kv_row, kv_chunk, slot_rows,
    SLOTS: gl.constexpr, HEAD_DIM: gl.constexpr, STRIDE_KT: gl.constexpr, STRIDE_VT: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr,
):  # fmt: skip
    chunk, start, blocks = top_block(seen, kv_chunk, SLOTS, BLOCK_N)
    if blocks > 0:
        # Descriptors are made while the consumers load their rows, that of V while the first keys are on their way.
        k_desc = key_descriptor(
            k_ptr, seen, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM, STRIDE_KT, BLOCK_N, BLOCK_D, HEADS_TOGETHER
        )
        slot, row = block_place(chunk, start, kv_row, kv_chunk, SLOTS)
        load_block(k_desc, [slot, row, 0], k_full, k_smem, 0, STAGES, BYTES)
        v_desc = key_descriptor(
            v_ptr, seen, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM, STRIDE_VT, BLOCK_N, BLOCK_D, HEADS_TOGETHER
        )
        load_block(v_desc, [slot, row, 0], v_full, v_smem, 0, STAGES, BYTES)
        head = 0
        for i in range(1, blocks * HEADS_TOGETHER):
            chunk, start, head, slot, row = next_place(
                i, blocks, chunk, start, head, seen, kv_row, kv_chunk, SLOTS, BLOCK_N, HEADS_TOGETHER
            )
            wait_turn(empty, i, STAGES)
            load_block(k_desc, [slot, row, head * HEAD_DIM], k_full, k_smem, i, STAGES, BYTES)
            load_block(v_desc, [slot, row, head * HEAD_DIM], v_full, v_smem, i, STAGES, BYTES)


@gluon.jit
def _block(
    scores, dq, dout, lse2, delta, zero, columns_smem, limit, end, masked, ragged, kv_chunk, k_smem, v_smem,
    v_full, i, SLOTS: gl.constexpr, P_LAYOUT: gl.constexpr, SCALE_LOG2: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """(what block `i`, whose scores are under way, adds to dQ: the product is under way; next ragged block)."""
    dp = issue_scores(dout, v_smem, v_full, i, zero, STAGES)
    scores = hopper.warpgroup_mma_wait(1, [scores])
    p = gl.exp2(scores * SCALE_LOG2 - lse2[:, None])
    # Already complete: a branch that keeps the assembler from hoisting the next wait above the exponentials.
    wait_block(v_full, i, STAGES)
    dp = hopper.warpgroup_mma_wait(0, [dp])
    ds = p * (dp - delta[:, None])
    ds, ragged = hide(ds, 0.0, columns_smem, limit, i, end, masked, ragged, kv_chunk, SLOTS, BLOCK_N)
    ds_operand = gl.convert_layout(ds.to(dout.dtype), P_LAYOUT)
    return hopper.warpgroup_mma(ds_operand, block_of(k_smem, i, STAGES), dq, is_async=True), ragged


@gluon.jit
def _consumer(
    warpgroup: gl.constexpr, values, SLOTS: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    STRIDE_DOT: gl.constexpr, STRIDE_DOH: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, HEADS_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    q_ptr, dout_ptr, delta_ptr, lse2_ptr, dq_ptr = values[0]
    q_smem, dout_smem, k_smem, v_smem, columns_smem, k_full, v_full, empty = values[1]
    row, q_row, q_len, diagonal, kv_len, seen, kv_chunk, first_kv_head, T = values[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=D_LAYOUT, k_width=2)
    # The loop over blocks of 64 keys came out 4 % slower with the other layout, and one head stores little. From Triton
    # 3.8 on it takes what registers there are, which makes the loop without that layout wait for every product.
    PLAIN: gl.constexpr = HEADS_TOGETHER == 1 and BLOCK_N == 64 and not SINCE_3_8
    RESULT_LAYOUT: gl.constexpr = D_LAYOUT if PLAIN else result_layout(BLOCK_D, dq_ptr.dtype.element_ty)
    SCALE_LOG2: gl.constexpr = SOFTMAX_SCALE * LOG2_E
    last_row = q_len * GROUP
    first = row + warpgroup * 64

    q = q_smem.index(warpgroup)
    dout = dout_smem.index(warpgroup)
    q_rows = load_queries(q_ptr, first, last_row, q_row, first_kv_head, GROUP, HEAD_DIM, BLOCK_D, STRIDE_QT, STRIDE_QH)
    dout_rows = load_queries(
        dout_ptr, first, last_row, q_row, first_kv_head, GROUP, HEAD_DIM, BLOCK_D, STRIDE_DOT, STRIDE_DOH
    )
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
    limit = gl.minimum(diagonal + rows // GROUP + 1, kv_len)
    seen_by_all = gl.minimum(diagonal + first // GROUP + 1, kv_len)
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    _, _, blocks = top_block(seen, kv_chunk, SLOTS, BLOCK_N)
    hidden, first_ragged = blocks_to_hide(blocks, seen_by_all, kv_chunk, SLOTS, BLOCK_N)
    scale = gl.where(kv_len < 0, float("nan"), SOFTMAX_SCALE)  # impossible tables poison
    for n in range(HEADS_TOGETHER):
        kv_head = first_kv_head + n
        # Blocks are numbered through all heads, as the producer brings them.
        begin, end = n * blocks, (n + 1) * blocks
        masked, ragged = begin + hidden, begin + first_ragged
        q.store(q_rows)
        dout.store(dout_rows)
        hopper.fence_async_shared()
        thread_barrier()
        statistics = n * T.to(gl.int64) * GROUP + q_row * GROUP + rows
        lse2 = gl.load(lse2_ptr + statistics, mask=rows < last_row, other=float("inf"))
        delta = gl.load(delta_ptr + statistics, mask=rows < last_row, other=0.0)
        dq = gl.zeros([64, BLOCK_D], gl.float32, D_LAYOUT)
        # The scores of a block are queued behind dQ of the one before.
        if blocks > 0:
            scores = issue_scores(q, k_smem, k_full, begin, zero, STAGES)
            dq_token, ragged = _block(
                scores, dq, dout, lse2, delta, zero, columns_smem, limit, end, masked, ragged, kv_chunk, k_smem,
                v_smem, v_full, begin, SLOTS, P_LAYOUT, SCALE_LOG2, BLOCK_N, STAGES,
            )  # fmt: skip
            for i in range(begin + 1 if HEADS_TOGETHER == 1 else opaque(begin + 1), end):
                scores = issue_scores(q, k_smem, k_full, i, zero, STAGES)
                dq = hopper.warpgroup_mma_wait(1, [dq_token])
                hopper.mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
                dq_token, ragged = _block(
                    scores, dq, dout, lse2, delta, zero, columns_smem, limit, end, masked, ragged, kv_chunk, k_smem,
                    v_smem, v_full, i, SLOTS, P_LAYOUT, SCALE_LOG2, BLOCK_N, STAGES,
                )  # fmt: skip
            dq = hopper.warpgroup_mma_wait(0, [dq_token])
            if HEADS_TOGETHER > 1:  # only then: it made the loop above 10 % slower
                hopper.mbarrier.arrive(empty.index((end - 1) % STAGES), count=1)

        if HEADS_TOGETHER > 1:  # the next rows come while these results leave
            last = gl.where(n < HEADS_TOGETHER - 1, last_row, 0)
            q_rows = load_queries(
                q_ptr, first, last, q_row, kv_head + 1, GROUP, HEAD_DIM, BLOCK_D, STRIDE_QT, STRIDE_QH
            )
            dout_rows = load_queries(
                dout_ptr, first, last, q_row, kv_head + 1, GROUP, HEAD_DIM, BLOCK_D, STRIDE_DOT, STRIDE_DOH
            )
        out_rows, places = row_places(first, q_row, kv_head, HEADS, GROUP, HEAD_DIM, RESULT_LAYOUT)
        store_tile(dq_ptr, places, out_rows < last_row, dq * scale, HEAD_DIM, ACCUMULATE)


@gluon.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def backward_dq_hopper(
    q_ptr, k_ptr, v_ptr, dout_ptr, delta_ptr, lse2_ptr, segments_ptr, into_dq_ptr,
    n_segments, T, slot_rows, first_kv_head, dq_ptr,
    SLOTS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr,
    STRIDE_DOT: gl.constexpr, STRIDE_DOH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TILES_TOGETHER: gl.constexpr, HEADS_TOGETHER: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Arguments and results: `portable.dq.backward_dq`. BLOCK_M is 128: 64 rows a consumer."""
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
    head = window_head.to(gl.int64)
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    WARPGROUPS: gl.constexpr = BLOCK_M // 64
    BYTES: gl.constexpr = BLOCK_N * BLOCK_D * 2
    Q_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    k_ptr += head * STRIDE_KH
    v_ptr += head * STRIDE_VH
    delta_ptr += head * T * GROUP
    lse2_ptr += head * T * GROUP
    q_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS, 64, BLOCK_D], Q_SMEM)
    dout_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS, 64, BLOCK_D], Q_SMEM)
    k_smem, k_full = make_stages([STAGES, 1, BLOCK_N, BLOCK_D], dtype, 1)
    v_smem, v_full = make_stages([STAGES, 1, BLOCK_N, BLOCK_D], dtype, 1)
    columns_smem = make_columns(BLOCK_N)
    empty = make_barriers(STAGES, WARPGROUPS)
    hopper.fence_async_shared()
    # A tuple bound to a name turns its constexprs into tensors: those stay outside.
    values = (
        (q_ptr, dout_ptr, delta_ptr, lse2_ptr, dq_ptr),
        (q_smem, dout_smem, k_smem, v_smem, columns_smem, k_full, v_full, empty),
        (row, q_row, q_len, diagonal, kv_len, seen, kv_chunk, kv_head, T),
    )
    specialize_warps(
        _consumer, (
            values, SLOTS, HEADS, GROUP, HEAD_DIM, SOFTMAX_SCALE, STRIDE_QT, STRIDE_QH, STRIDE_DOT, STRIDE_DOH,
            BLOCK_N, BLOCK_D, STAGES, HEADS_TOGETHER, ACCUMULATE,
        ), WARPGROUPS,
        (_producer, (
            k_ptr, v_ptr, k_smem, v_smem, k_full, v_full, empty, seen, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM,
            STRIDE_KT, STRIDE_VT, BLOCK_N, BLOCK_D, STAGES, BYTES, HEADS_TOGETHER,
        ), 4),
    )  # fmt: skip
