"""The dK/dV kernel for Hopper: each of two consumer warpgroups owns 64 keys and keeps their dK and dV in registers.

Rows, keys, windows and in-place results are those of `portable.dkdv`. Scores are transposed, so that P and dS
are operands from registers. A producer warpgroup streams query rows: a box of tokens by heads, brought by the copy
engine (TMA), lies in shared memory as packed rows; their statistics come by plain loads. Boxes are clipped to the rows
of the sequence: what lies behind is read as zero, never as another sequence's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..base2 import LOG2_E
from ..segments.lookup import chunk_row, load_half, load_sequence, load_sequence_rows, tile_and_head
from .pipeline import (
    block_of,
    issue_scores,
    load_block,
    load_pointers,
    make_barriers,
    make_stages,
    opaque,
    result_layout,
    specialize_warps,
    store_tile,
    thread_barrier,
    wait_turn,
)


@gluon.jit
def _key_rows(keys, kv_row, kv_chunk, slot_rows, SLOTS: gl.constexpr):
    """Rows (int64) of the K/V buffer that `keys` of one sequence are in."""
    rows = kv_row + keys
    if SLOTS > 1:
        chunks = keys // kv_chunk
        rows += chunk_row(chunks, kv_chunk, slot_rows, SLOTS) - chunks * kv_chunk
    return rows.to(gl.int64)


@gluon.jit
def _copy_keys(
    k_ptr, v_ptr, k, v, first, n_keys, kv_row, kv_chunk, slot_rows, SLOTS: gl.constexpr, HEAD_DIM: gl.constexpr,
    STRIDE_KT: gl.constexpr, STRIDE_VT: gl.constexpr,
):  # fmt: skip
    """Begin to copy K and V of the keys from `first` on into `k` and `v` `[64, BLOCK_D]`, zero behind the last.

    Each row is copied by itself, as a tile may cross borders of chunks.
    """
    BLOCK_D: gl.constexpr = k.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    keys = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    rows = _key_rows(keys, kv_row, kv_chunk, slot_rows, SLOTS)
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    mask = (keys < n_keys)[:, None] & (dims < HEAD_DIM)[None, :]
    load_pointers(k, k_ptr + (rows * STRIDE_KT)[:, None] + dims[None, :], mask)
    load_pointers(v, v_ptr + (rows * STRIDE_VT)[:, None] + dims[None, :], mask)
    async_copy.commit_group()


@gluon.jit
def _half(halves_ptr, half, first_key, n_keys, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, TOKENS: gl.constexpr):
    """(q_row, diagonal, kv_len, first token, blocks, masked blocks) of the rows of a half that see key `first_key`.

    Whole blocks of TOKENS end with the segment; the first may begin before the first row that sees the key, or before
    token 0 (`_block_tokens`). The first few are masked: not all of their rows see all keys of the tile. A block that
    would begin before token 0 is one of them.
    """
    q_row, q_len, diagonal, kv_len = load_half(halves_ptr, half, n_keys, CAUSAL)
    begin = gl.minimum(gl.maximum(first_key - diagonal, 0), q_len)
    begin = gl.where(first_key < kv_len, begin, q_len)
    blocks = (q_len - begin + TOKENS - 1) // TOKENS
    token = q_len - blocks * TOKENS
    last_key = gl.minimum(first_key + BLOCK_N, n_keys) - 1
    begin_full = gl.where(last_key < kv_len, gl.maximum(last_key - diagonal, 0), q_len)
    masked = gl.minimum((gl.maximum(begin_full - token, 0) + TOKENS - 1) // TOKENS, blocks)
    return q_row, diagonal, kv_len, token, blocks, masked


@gluon.jit
def _block_tokens(first, block, TOKENS: gl.constexpr):
    """(begin, end) of the tokens of its half that block `block` is for, where the blocks begin with token `first`.

    The box of a block begins with `begin`, which is never negative: the copy engine can add to a box that ends behind
    the last row, but not to one that begins before the first. From `end` on its rows are the next block's, or behind
    the segment, and hidden.
    """
    return gl.maximum(first + block * TOKENS, 0), first + (block + 1) * TOKENS


@gluon.jit
def _row_descriptor(
    ptr, kv_head, sequence_row, sequence_rows, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, STRIDE_T: gl.constexpr,
    STRIDE_H: gl.constexpr, BOX: gl.constexpr, HEADS_TOGETHER: gl.constexpr = 1,
):  # fmt: skip
    """Descriptor of the query rows of one sequence, no others, [row, head, head_dim]: the early half, then the late."""
    return hopper.tma.make_tensor_descriptor(
        ptr + kv_head * GROUP * STRIDE_H + sequence_row.to(gl.int64) * STRIDE_T,
        [sequence_rows, GROUP * HEADS_TOGETHER, HEAD_DIM], [STRIDE_T, STRIDE_H, 1], BOX,
        gl.NVMMASharedLayout.get_default_for(BOX, ptr.dtype.element_ty),
    )  # fmt: skip


@gluon.jit
def _producer(
    q_ptr, dout_ptr, lse2_ptr, delta_ptr, halves_ptr, q_smem, dout_smem, lse2_smem, delta_smem, limit_smem,
    q_full, dout_full, empty, first_key, n_keys, kv_head, sequence_row, sequence_rows, T, CAUSAL: gl.constexpr,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    STRIDE_DOT: gl.constexpr, STRIDE_DOH: gl.constexpr, PACK: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HEADS_TOGETHER: gl.constexpr = 1,
):  # fmt: skip
    TOKENS: gl.constexpr = BLOCK_M // PACK
    BYTES: gl.constexpr = BLOCK_M * BLOCK_D * 2
    BOX: gl.constexpr = [TOKENS, PACK, BLOCK_D]
    # Descriptors are made while the consumers load their keys.
    q_desc = _row_descriptor(
        q_ptr, kv_head, sequence_row, sequence_rows, GROUP, HEAD_DIM, STRIDE_QT, STRIDE_QH, BOX, HEADS_TOGETHER
    )  # fmt: skip
    dout_desc = _row_descriptor(
        dout_ptr, kv_head, sequence_row, sequence_rows, GROUP, HEAD_DIM, STRIDE_DOT, STRIDE_DOH, BOX, HEADS_TOGETHER
    )  # fmt: skip
    rows = gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    i = 0
    # Head after head, the whole blocks of the late half and of the early one, then the masked ones of both: most tiles
    # have none of those, and would only wait here to learn it.
    for run in range(4 * HEADS_TOGETHER):
        q_row, diagonal, kv_len, first, blocks, masked = _half(
            halves_ptr, run % 2, first_key, n_keys, CAUSAL, BLOCK_N, TOKENS
        )
        head, is_whole = run // 4, run % 4 < 2
        for block in range(gl.where(is_whole, masked, 0), gl.where(is_whole, blocks, masked)):
            begin, end = _block_tokens(first, block, TOKENS)
            tokens = begin + rows // PACK
            limit = gl.where(tokens < end, gl.minimum(diagonal + tokens + 1, kv_len), 0)
            row = q_row + begin - sequence_row
            for part in range(GROUP // PACK):
                statistics = head * T.to(gl.int64) * GROUP + (q_row + tokens) * GROUP + part * PACK + rows % PACK
                lse2 = gl.load(lse2_ptr + statistics, mask=tokens < end, other=float("inf"))
                delta = gl.load(delta_ptr + statistics, mask=tokens < end, other=0.0)
                stage = i % STAGES
                place = [row, head * GROUP + part * PACK, 0]
                wait_turn(empty, i, STAGES)
                load_block(q_desc, place, q_full, q_smem, i, STAGES, BYTES)
                lse2_smem.index(stage).store(lse2)
                limit_smem.index(stage).store(limit)
                hopper.mbarrier.arrive(q_full.index(stage), count=1)
                load_block(dout_desc, place, dout_full, dout_smem, i, STAGES, BYTES)
                delta_smem.index(stage).store(delta)
                hopper.mbarrier.arrive(dout_full.index(stage), count=1)
                i += 1


@gluon.jit
def _block(
    scores, dk, dv, v, zero, keys, q_smem, dout_smem, lse2_smem, delta_smem, limit_smem, dout_full, i, whole,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, SCALE_LOG2: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What block `i`, whose scores are under way, adds to dV and dK: both products are under way, in this order."""
    R_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = v.dtype
    stage = i % STAGES
    dp = issue_scores(v, dout_smem, dout_full, i, zero, STAGES)
    lse2 = lse2_smem.index(stage).load(R_LAYOUT)
    scores = hopper.warpgroup_mma_wait(1, [scores])
    p = gl.exp2(scores * SCALE_LOG2 - lse2[None, :])
    if i >= whole:
        limit = limit_smem.index(stage).load(R_LAYOUT)
        p = gl.where(keys[:, None] < limit[None, :], p, 0.0)
    p_operand = gl.convert_layout(p.to(dtype), P_LAYOUT)
    delta = delta_smem.index(stage).load(R_LAYOUT)
    dp = hopper.warpgroup_mma_wait(0, [dp])
    ds_operand = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), P_LAYOUT)
    dv = hopper.warpgroup_mma(p_operand, block_of(dout_smem, i, STAGES), dv, is_async=True)
    return hopper.warpgroup_mma(ds_operand, block_of(q_smem, i, STAGES), dk, is_async=True), dv


@gluon.jit
def _consumer(
    warpgroup: gl.constexpr, values, SLOTS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    SOFTMAX_SCALE: gl.constexpr, STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr,
    STRIDE_VH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    k_ptr, v_ptr, dk_ptr, dv_ptr, k_smem, v_smem = values[0]
    q_smem, dout_smem, lse2_smem, delta_smem, limit_smem, q_full, dout_full, empty = values[1]
    first_key, n_keys, kv_row, kv_chunk, slot_rows, first_head, poison, blocks, whole = values[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=D_LAYOUT, k_width=2)
    RESULT_LAYOUT: gl.constexpr = result_layout(BLOCK_D, dk_ptr.dtype.element_ty)
    SCALE_LOG2: gl.constexpr = SOFTMAX_SCALE * LOG2_E
    first = first_key + warpgroup * 64
    k = k_smem.index(warpgroup)
    v = v_smem.index(warpgroup)
    k_ptr += first_head.to(gl.int64) * STRIDE_KH
    v_ptr += first_head.to(gl.int64) * STRIDE_VH
    _copy_keys(k_ptr, v_ptr, k, v, first, n_keys, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM, STRIDE_KT, STRIDE_VT)
    for n in range(HEADS_TOGETHER):
        # Blocks are numbered through all heads, as the producer brings them.
        begin, end = n * blocks, (n + 1) * blocks
        last_whole = begin + whole
        async_copy.wait_group(0)
        hopper.fence_async_shared()
        thread_barrier()

        keys = first + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
        zero = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
        dk = gl.zeros([64, BLOCK_D], gl.float32, D_LAYOUT)
        dv = gl.zeros([64, BLOCK_D], gl.float32, D_LAYOUT)
        # The scores of a block are queued behind dK of the one before: the tensor cores work while dK is collected.
        if blocks > 0:
            scores = issue_scores(k, q_smem, q_full, begin, zero, STAGES)
            dk_token, dv_token = _block(
                scores, dk, dv, v, zero, keys, q_smem, dout_smem, lse2_smem, delta_smem, limit_smem, dout_full, begin,
                last_whole, S_LAYOUT, P_LAYOUT, SCALE_LOG2, STAGES,
            )  # fmt: skip
            for i in range(begin + 1 if HEADS_TOGETHER == 1 else opaque(begin + 1), end):
                scores = issue_scores(k, q_smem, q_full, i, zero, STAGES)
                dk, dv = hopper.warpgroup_mma_wait(1, [dk_token, dv_token])
                hopper.mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
                dk_token, dv_token = _block(
                    scores, dk, dv, v, zero, keys, q_smem, dout_smem, lse2_smem, delta_smem, limit_smem, dout_full, i,
                    last_whole, S_LAYOUT, P_LAYOUT, SCALE_LOG2, STAGES,
                )  # fmt: skip
            dk, dv = hopper.warpgroup_mma_wait(0, [dk_token, dv_token])
            if HEADS_TOGETHER > 1:  # only then: it made the loop above 10 % slower
                hopper.mbarrier.arrive(empty.index((end - 1) % STAGES), count=1)

        if HEADS_TOGETHER > 1:
            k_ptr += STRIDE_KH
            v_ptr += STRIDE_VH
            thread_barrier()
            if n < HEADS_TOGETHER - 1:  # the next keys come while these results leave
                _copy_keys(
                    k_ptr, v_ptr, k, v, first, n_keys, kv_row, kv_chunk, slot_rows, SLOTS, HEAD_DIM, STRIDE_KT,
                    STRIDE_VT,
                )  # fmt: skip
        keys = first + gl.arange(0, 64, gl.SliceLayout(1, RESULT_LAYOUT))
        inside = keys < n_keys
        rows = _key_rows(keys, kv_row, kv_chunk, slot_rows, SLOTS)
        places = (rows * KV_HEADS + first_head + n) * HEAD_DIM
        valid = gl.where(poison, float("nan"), 1.0)
        store_tile(dv_ptr, places, inside, dv * valid, HEAD_DIM, ACCUMULATE)
        store_tile(dk_ptr, places, inside, dk * (valid * SOFTMAX_SCALE), HEAD_DIM, ACCUMULATE)


@gluon.jit(do_not_specialize=["n_sequences", "T", "slot_rows", "first_kv_head"])
def backward_dkdv_hopper(
    q_ptr, k_ptr, v_ptr, dout_ptr, delta_ptr, lse2_ptr, sequences_ptr, into_dk_ptr, into_dv_ptr,
    n_sequences, T, slot_rows, first_kv_head, dk_ptr, dv_ptr,
    SLOTS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr,
    SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr, STRIDE_KT: gl.constexpr,
    STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr, STRIDE_DOT: gl.constexpr,
    STRIDE_DOH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, TILES_TOGETHER: gl.constexpr, HEADS_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Arguments and results: `portable.dkdv.backward_dkdv`. BLOCK_N is 128: 64 keys a consumer."""
    # Heads of one TMA box: as many of the group as a power of two divides; the others are further blocks.
    POWER: gl.constexpr = GROUP & -GROUP
    PACK: gl.constexpr = POWER if POWER < BLOCK_M else BLOCK_M
    TOKENS: gl.constexpr = BLOCK_M // PACK
    tile, heads = tile_and_head(KV_HEADS // HEADS_TOGETHER, TILES_TOGETHER)
    window_head = heads * HEADS_TOGETHER
    halves_ptr, first_key, n_keys, kv_row, kv_chunk, poison = load_sequence(
        sequences_ptr, n_sequences, tile, slot_rows, SLOTS, BLOCK_N
    )
    if first_key >= n_keys:
        return

    _, _, _, _, late_blocks, late_masked = _half(halves_ptr, 0, first_key, n_keys, CAUSAL, BLOCK_N, TOKENS)
    _, _, _, _, early_blocks, early_masked = _half(halves_ptr, 1, first_key, n_keys, CAUSAL, BLOCK_N, TOKENS)
    blocks = (late_blocks + early_blocks) * (GROUP // PACK)
    whole = blocks - (late_masked + early_masked) * (GROUP // PACK)
    kv_head = (first_kv_head + window_head).to(gl.int64)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    WARPGROUPS: gl.constexpr = BLOCK_N // 64
    KEY_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    STATISTIC_SMEM: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sequence_row, sequence_rows = load_sequence_rows(halves_ptr)
    lse2_ptr += window_head.to(gl.int64) * T * GROUP
    delta_ptr += window_head.to(gl.int64) * T * GROUP
    k_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS, 64, BLOCK_D], KEY_SMEM)
    v_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS, 64, BLOCK_D], KEY_SMEM)
    # Two arrivals: the rows, by the copy engine, and their statistics.
    q_smem, q_full = make_stages([STAGES, TOKENS, PACK, BLOCK_D], dtype, 2)
    dout_smem, dout_full = make_stages([STAGES, TOKENS, PACK, BLOCK_D], dtype, 2)
    empty = make_barriers(STAGES, WARPGROUPS)
    lse2_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], STATISTIC_SMEM)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], STATISTIC_SMEM)
    limit_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], STATISTIC_SMEM)
    hopper.fence_async_shared()
    # A tuple bound to a name turns its constexprs into tensors: those stay outside.
    values = (
        (k_ptr, v_ptr, dk_ptr, dv_ptr, k_smem, v_smem),
        (q_smem, dout_smem, lse2_smem, delta_smem, limit_smem, q_full, dout_full, empty),
        (first_key, n_keys, kv_row, kv_chunk, slot_rows, window_head, poison, blocks, whole),
    )
    specialize_warps(
        _consumer, (
            values, SLOTS, KV_HEADS, HEAD_DIM, SOFTMAX_SCALE, STRIDE_KT, STRIDE_KH, STRIDE_VT, STRIDE_VH, BLOCK_M,
            BLOCK_D, STAGES, HEADS_TOGETHER, ACCUMULATE,
        ), WARPGROUPS,
        (_producer, (
            q_ptr, dout_ptr, lse2_ptr, delta_ptr, halves_ptr, q_smem, dout_smem, lse2_smem, delta_smem, limit_smem,
            q_full, dout_full, empty, first_key, n_keys, kv_head, sequence_row, sequence_rows, T, CAUSAL, GROUP,
            HEAD_DIM, STRIDE_QT, STRIDE_QH, STRIDE_DOT, STRIDE_DOH, PACK, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
            HEADS_TOGETHER,
        ), 4),
    )  # fmt: skip
