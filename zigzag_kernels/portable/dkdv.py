"""The dK/dV kernel: one program sums dK and dV of one tile of keys.

This kernel and the dQ kernel both compute the scores, as in FlashAttention-2. Therefore no kernel needs atomics: one
program owns each sum, and the same inputs give the same bits. The sums run over both chunks of the rank and over the
query heads of the group.
Grid: tiles × KV heads of the window.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..base2 import LOG2_E
from ..segments.lookup import key_index, load_document, load_half, load_ranged_half, load_sequence, tile_and_head
from ..segments.ranges import keys_of_positions
from .arithmetic import cap_scores, cast, dot
from .constants import bundle
from .ranges import (
    ROW_RUNS,
    WHOLE_ROWS,
    has_row_run,
    keys_of_rows,
    row_run,
    seeing_row_range,
    seeing_rows,
    sees,
)
from .rows import KeyBlock, key_places, load_rows, make_key_rows, query_places, store_rows


class QueryArrays(NamedTuple):
    """Pointers to arrays that the kernel reads by query row, each to the first row of one KV head."""

    q_ptr: tl.tensor
    dout_ptr: tl.tensor
    delta_ptr: tl.tensor  # sum(out * dout) - dlse of each row, from `delta.py`
    lse2_ptr: tl.tensor  # lse of each row in base 2, from `delta.py`


class Sums(NamedTuple):
    """The sums of a tile of keys, `[BLOCK_N, BLOCK_D]` float32, which become its gradients."""

    dk: tl.tensor  # not yet scaled
    dv: tl.tensor


@triton.jit
def _add_rows(sums, tile, rows_of, arrays, row, end_row, CONSTANTS: tl.constexpr, RUN: tl.constexpr):
    """Return `sums` after adding the rows `[row, row + BLOCK_M)` of a segment; rows from `end_row` on add nothing.

    `RUN` is the number of the run that the block belongs to: see `ranges.py`.
    """
    half, document = rows_of
    MASKED: tl.constexpr = RUN != WHOLE_ROWS
    GROUP: tl.constexpr = CONSTANTS.GROUP
    HEAD_DIM: tl.constexpr = CONSTANTS.HEAD_DIM
    BLOCK_M: tl.constexpr = CONSTANTS.BLOCK_M
    BLOCK_D: tl.constexpr = CONSTANTS.BLOCK_D
    INTERPRET: tl.constexpr = CONSTANTS.INTERPRET
    dk, dv = sums.dk, sums.dv
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < end_row
    places = query_places(row, half.q_row, GROUP, BLOCK_M, CONSTANTS.STRIDE_QT, CONSTANTS.STRIDE_QH)
    q = load_rows(arrays.q_ptr + places.start, places.offsets, inside, MASKED, HEAD_DIM, BLOCK_D)
    statistics = half.q_row * GROUP + rows
    # Scores are transposed, [BLOCK_N, BLOCK_M]: P and dS can then multiply dO and Q without another transposition.
    scores = dot(tile.k, tl.trans(q), None, INTERPRET)
    if CONSTANTS.SOFTCAP > 0:
        scores = cap_scores(scores, CONSTANTS.CAP_LOG2, CONSTANTS.SOFTCAP)
    if MASKED:
        # Rows behind the last row get lse2 = inf, and so the probability exp2(-inf) = 0.
        lse2 = tl.load(arrays.lse2_ptr + statistics, mask=inside, other=float("inf"))
    else:
        lse2 = tl.load(arrays.lse2_ptr + statistics)
    p = tl.math.exp2(scores * CONSTANTS.SCALE_LOG2 - lse2[None, :])
    if MASKED:
        if CONSTANTS.RANGED:
            by_row = keys_of_positions(half.position + places.tokens, document, CONSTANTS)
        else:
            by_row = keys_of_rows(places.tokens, half.diagonal, half.kv_len)
        # A masked score may be larger than lse, and its exponential infinite. So p is replaced by 0: infinity times 0
        # would be NaN.
        p = tl.where(sees(by_row, tile.keys, CONSTANTS.RANGED, True), p, 0.0)
    places = query_places(row, half.q_row, GROUP, BLOCK_M, CONSTANTS.STRIDE_DOT, CONSTANTS.STRIDE_DOH)
    dout = load_rows(arrays.dout_ptr + places.start, places.offsets, inside, MASKED, HEAD_DIM, BLOCK_D)
    if CONSTANTS.HAS_DV:
        dv = dot(cast(p, dout.dtype, INTERPRET), dout, dv, INTERPRET)
    if CONSTANTS.HAS_DK:
        dp = dot(tile.v, tl.trans(dout), None, INTERPRET)
        if MASKED:
            delta = tl.load(arrays.delta_ptr + statistics, mask=inside, other=0.0)
        else:
            delta = tl.load(arrays.delta_ptr + statistics)
        ds = p * (dp - delta[None, :])
        if CONSTANTS.SOFTCAP > 0:
            # Multiply by the derivative of the cap, 1 - tanh^2; `scores` are the tanh. Only dS needs this factor.
            ds *= 1.0 - scores * scores
        dk = dot(cast(ds, q.dtype, INTERPRET), q, dk, INTERPRET)
    return Sums(dk=dk, dv=dv)


@triton.jit(do_not_specialize=["n_sequences", "T", "slot_rows", "first_kv_head"])
def backward_dkdv(
    q_ptr,  # [T, HEADS, HEAD_DIM]
    k_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    dout_ptr,  # [T, HEADS, HEAD_DIM]
    delta_ptr,  # [KV_HEADS, T * GROUP] float32
    lse2_ptr,
    sequences_ptr,
    into_dk_ptr,  # the same memory as dk and dv, or unused
    into_dv_ptr,
    n_sequences,
    T,
    slot_rows,
    first_kv_head,
    dk_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    dv_ptr,
    SLOTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr,
    RANGED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STRIDE_QT: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    STRIDE_DOT: tl.constexpr,
    STRIDE_DOH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERPRET: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
):
    """Write dK (`HAS_DK`) and dV (`HAS_DV`) of the window's KV heads.

    `ACCUMULATE` adds to the gradients that are already in memory.
    """
    CONSTANTS: tl.constexpr = bundle(
        GROUP=GROUP,
        HEAD_DIM=HEAD_DIM,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        SCALE_LOG2=(SOFTCAP if SOFTCAP > 0 else SOFTMAX_SCALE) * LOG2_E,
        CAP_LOG2=2 * SOFTMAX_SCALE * LOG2_E / SOFTCAP if SOFTCAP > 0 else 0.0,
        STRIDE_QT=STRIDE_QT,
        STRIDE_QH=STRIDE_QH,
        STRIDE_DOT=STRIDE_DOT,
        STRIDE_DOH=STRIDE_DOH,
        HAS_DK=HAS_DK,
        HAS_DV=HAS_DV,
        RANGED=RANGED,
        CAUSAL=CAUSAL,
        LEFT=LEFT,
        RIGHT=RIGHT,
        CHUNK=CHUNK,
        SOFTCAP=SOFTCAP,
        INTERPRET=INTERPRET,
    )
    number, window_head = tile_and_head(KV_HEADS, TILES_TOGETHER)
    found = load_sequence(sequences_ptr, n_sequences, number, T, slot_rows, SLOTS, BLOCK_N)
    # The grid is an upper bound: this program may have no tile.
    if found.first_key >= found.n_keys:
        return

    kv_head = (first_kv_head + window_head).to(tl.int64)
    window_head = window_head.to(tl.int64)
    numbers = found.first_key + tl.arange(0, BLOCK_N)
    inside = numbers < found.n_keys
    place, loaded_keys = 0, inside
    if RANGED:  # padding keys may hold any bits
        document = load_document(found)
        place, loaded_keys = document.place, inside & (numbers < key_index(document, document.real))
    # A tile of keys may cross borders of chunks, and chunks lie in different slots, so each key's row is computed.
    key_rows = make_key_rows(found.kv_row, found.kv_chunk, slot_rows, place)
    first_row, rows = key_places(key_rows, found.first_key, SLOTS, BLOCK_N, False)
    rows += first_row
    k = load_rows(k_ptr + window_head * STRIDE_KH, rows * STRIDE_KT, loaded_keys, True, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + window_head * STRIDE_VH, rows * STRIDE_VT, loaded_keys, True, HEAD_DIM, BLOCK_D)
    tile = KeyBlock(keys=numbers, k=k, v=v)
    arrays = QueryArrays(
        # Q and dO have all heads, which `kv_head` counts; delta and lse2 have the heads of the window, which
        # `window_head` counts.
        q_ptr=q_ptr + kv_head * GROUP * STRIDE_QH,
        dout_ptr=dout_ptr + kv_head * GROUP * STRIDE_DOH,
        delta_ptr=delta_ptr + window_head * T * GROUP,
        lse2_ptr=lse2_ptr + window_head * T * GROUP,
    )

    # This program owns its tile of keys, so the rows of both halves of the sequence, late and early, add to its sums.
    sums = Sums(dk=tl.zeros([BLOCK_N, BLOCK_D], tl.float32), dv=tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    for i in range(2):
        if RANGED:
            half = load_ranged_half(found.halves_ptr, i)
            rows_of = half, document
            seeing = seeing_row_range(half, document, found.first_key, CONSTANTS)
        else:
            half = load_half(found.halves_ptr, i, found.n_keys, CAUSAL)
            rows_of = half, half
            seeing = seeing_rows(half, found.first_key, found.n_keys, CONSTANTS)
        for RUN in tl.static_range(ROW_RUNS):
            if has_row_run(RUN, RANGED):
                begin, end = row_run(seeing, RUN)
                for row in range(begin, end, BLOCK_M):
                    sums = _add_rows(sums, tile, rows_of, arrays, row, end, CONSTANTS, RUN)

    # The scores were scaled inside exp2, so by the chain rule their gradient is scaled too: once, after the sum.
    dk = sums.dk * SOFTMAX_SCALE
    dv = sums.dv
    if found.poison:  # invalid tables: every result becomes NaN
        dk = tl.full([BLOCK_N, BLOCK_D], float("nan"), tl.float32)
        dv = tl.full([BLOCK_N, BLOCK_D], float("nan"), tl.float32)
    # Every key of the tile is written; keys that no row sees, and padding, get gradients of zero.
    destination = (rows * KV_HEADS + window_head) * HEAD_DIM
    if HAS_DK:
        if ACCUMULATE:
            dk += load_rows(dk_ptr, destination, inside, True, HEAD_DIM, BLOCK_D)
        store_rows(dk_ptr, destination, dk, inside, HEAD_DIM, BLOCK_D, INTERPRET)
    if HAS_DV:
        if ACCUMULATE:
            dv += load_rows(dv_ptr, destination, inside, True, HEAD_DIM, BLOCK_D)
        store_rows(dv_ptr, destination, dv, inside, HEAD_DIM, BLOCK_D, INTERPRET)
