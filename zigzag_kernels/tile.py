"""Tiles of rows and keys in the portable kernels: which keys the rows see, and the products."""

import triton
import triton.language as tl

from .segments.lookup import chunk_row


@triton.jit
def key_rows(start, kv_row, kv_chunk, slot_rows, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the keys `[start, start + BLOCK_N)` of one sequence are in the K/V buffer:
    (int64 row, `[BLOCK_N]` rows behind it).

    `ALIGNED`: chunks are whole blocks, so that no block crosses a chunk border and what is behind does not change from
    block to block. Otherwise a block may cross one border or several, and then each key finds its own chunk; the
    division is done in float32, exact because BLOCK_N is small.
    """
    offsets = tl.arange(0, BLOCK_N)
    if SLOTS == 1:
        return (kv_row + start).to(tl.int64), offsets
    elif ALIGNED:
        chunk = start // kv_chunk
        row = kv_row + chunk_row(chunk, kv_chunk, slot_rows, SLOTS) + start - chunk * kv_chunk
        return row.to(tl.int64), offsets
    else:
        first = start // kv_chunk
        left = (first + 1) * kv_chunk - start
        crossed = tl.floor(((offsets - left).to(tl.float32) + 0.5) * (1.0 / kv_chunk.to(tl.float32))) + 1.0
        chunk = first + tl.where(offsets < left, 0, crossed.to(tl.int32))
        rows = offsets + chunk_row(chunk, kv_chunk, slot_rows, SLOTS) + start - chunk * kv_chunk
        return kv_row.to(tl.int64), rows.to(tl.int64)


@triton.jit
def query_offsets(row, q_row, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, STRIDE_T, STRIDE_H):
    """Where the rows from `row` on of a segment are in an array of queries: (int64 offset, `[BLOCK_M]` offsets behind
    it, `[BLOCK_M]` tokens of the segment).

    `row` is a multiple of GROUP wherever BLOCK_M is, and then the second does not depend on `row`.
    """
    inner = tl.arange(0, BLOCK_M)
    if BLOCK_M % GROUP:
        inner += row % GROUP
    first = row // GROUP
    tokens = inner // GROUP
    return (q_row + first).to(tl.int64) * STRIDE_T, tokens * STRIDE_T + inner % GROUP * STRIDE_H, first + tokens


@triton.jit
def visible_keys(
    row,
    tokens,
    q_len,
    diagonal,
    kv_len,
    kv_chunk,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What the query tile that starts at `row` of its segment sees: (keys seen by each row `[BLOCK_M]`, and the ends of
    three runs of key blocks).

    Blocks of the first run are seen by all rows and `ALIGNED` (see `key_rows`), of the second seen by all rows, of the
    third by some. The first two are the same blocks: which of them is empty depends on the length of the chunks alone.
    """
    kv_len = tl.maximum(kv_len, 0)
    last_token = tl.minimum(row + BLOCK_M - 1, q_len * GROUP - 1) // GROUP
    seen_by_all = tl.minimum(diagonal + row // GROUP + 1, kv_len) // BLOCK_N * BLOCK_N
    seen_by_any = tl.minimum(diagonal + last_token + 1, kv_len)
    aligned_end = seen_by_all if SLOTS == 1 else tl.where(kv_chunk % BLOCK_N == 0, seen_by_all, 0)
    return tl.minimum(diagonal + tokens + 1, kv_len), aligned_end, seen_by_all, seen_by_any


@triton.jit
def load_rows(ptr, offsets, inside, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows that begin `offsets` elements (int64) behind `ptr`: `[len(offsets), BLOCK_D]`, zero behind HEAD_DIM.

    Rows that are not `inside` are zero if `MASKED`; otherwise the caller knows that all of them are.
    """
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets[:, None] + dims[None, :]
    if MASKED:
        return tl.load(ptrs, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def cast(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 `x` rounded to the nearest `DTYPE`. The interpreter cuts bfloat16 off instead, hence the carry there."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def store_rows(ptr, offsets, values, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr):
    """Write the rows that are `inside`, cast to what `ptr` points to; the inverse of `load_rows`."""
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptr + offsets[:, None] + dims[None, :], cast(values, ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """`acc + a @ b` in float32. The interpreter multiplies bfloat16 bit patterns, hence the exact upcast there."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def online_softmax_update(scores, maximum, total, SCALE_LOG2: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein, arXiv:1805.02867), in base 2.

    `scores [M, N]` unscaled, `maximum [M]` and `total [M]` running statistics of the scaled scores; returns the
    unnormalised probabilities, the new statistics and the factor for what was accumulated before.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * SCALE_LOG2)
    probabilities = tl.math.exp2(scores * SCALE_LOG2 - new_maximum[:, None])
    rescale = tl.math.exp2(maximum - new_maximum)
    return probabilities, new_maximum, total * rescale + tl.sum(probabilities, 1), rescale
