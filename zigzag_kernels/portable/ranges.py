"""The mask of the portable kernels: each query row sees one range of keys.

`KeyRange` is that range. Two things follow from it: the blocks of keys that a tile of rows walks through
(`visible_keys`, for the forward kernel and dQ), and the blocks of rows that a tile of keys walks through
(`seeing_rows`, for dK and dV). Both come as *runs* of blocks, one behind the other, and the number of a run says
whether its blocks need the mask. The kernels loop over the runs and do not know the shape of the mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Runs of blocks of keys, in this order.
ALIGNED_KEYS = tl.constexpr(0)  # every row sees every key, and chunks are whole blocks (see `rows.key_places`)
WHOLE_KEYS = tl.constexpr(1)  # every row sees every key
EDGE_KEYS = tl.constexpr(2)  # some rows do not see some keys
KEY_RUNS = tl.constexpr(3)

# Runs of blocks of query rows, in this order.
EDGE_ROWS = tl.constexpr(0)  # some rows do not see some keys
WHOLE_ROWS = tl.constexpr(1)  # every row sees every key
ROW_RUNS = tl.constexpr(2)


class KeyRange(NamedTuple):
    """The keys that each row of a tile sees: `[0, end)`."""

    end: tl.tensor  # [BLOCK_M], or a scalar for one row


class VisibleKeys(NamedTuple):
    """The keys that a tile of query rows sees: by row, and as the ends of the runs of blocks of keys.

    The runs `ALIGNED_KEYS` and `WHOLE_KEYS` have the same blocks: the length of the chunks decides which of the two
    is empty.
    """

    by_row: KeyRange
    aligned_end: tl.tensor
    whole_end: tl.tensor
    end: tl.tensor


class SeeingRows(NamedTuple):
    """The rows of a segment that see a tile of keys: the bounds of the runs of blocks of rows."""

    begin: tl.tensor
    whole_begin: tl.tensor
    end: tl.tensor


@triton.jit
def keys_of_rows(tokens, diagonal, kv_len):
    """Return the `KeyRange` of the rows of these `tokens` of a segment."""
    return KeyRange(end=tl.minimum(diagonal + tokens + 1, kv_len))


@triton.jit
def sees(by_row, keys, TRANSPOSED: tl.constexpr):
    """Return whether each row sees each of `keys`: `[rows, keys]`, or `[keys, rows]` if `TRANSPOSED`."""
    if TRANSPOSED:
        return keys[:, None] < by_row.end[None, :]
    else:
        return keys[None, :] < by_row.end[:, None]


@triton.jit
def visible_keys(queries, tokens, CONSTANTS: tl.constexpr):
    """Return the `VisibleKeys` of the tile `queries`, whose rows are of these `tokens` of its segment."""
    kv_len = tl.maximum(queries.kv_len, 0)
    first_token = queries.row // CONSTANTS.GROUP
    last_row = tl.minimum(queries.row + CONSTANTS.BLOCK_M - 1, queries.q_len * CONSTANTS.GROUP - 1)
    last_token = last_row // CONSTANTS.GROUP
    whole_end = keys_of_rows(first_token, queries.diagonal, kv_len).end // CONSTANTS.BLOCK_N * CONSTANTS.BLOCK_N
    end = keys_of_rows(last_token, queries.diagonal, kv_len).end
    if CONSTANTS.SLOTS == 1:
        aligned_end = whole_end
    else:
        aligned_end = tl.where(queries.kv_chunk % CONSTANTS.BLOCK_N == 0, whole_end, 0)
    by_row = keys_of_rows(tokens, queries.diagonal, kv_len)
    return VisibleKeys(by_row=by_row, aligned_end=aligned_end, whole_end=whole_end, end=end)


@triton.constexpr_function
def has_key_run(RUN, SLOTS):
    """Return whether run number `RUN` can have blocks.

    In one slot all keys follow each other, so that every whole block is aligned.
    """
    return SLOTS > 1 or WHOLE_KEYS.value != RUN


@triton.jit
def key_run(visible, RUN: tl.constexpr):
    """Return (begin, end) of run number `RUN` of blocks of keys."""
    if RUN == ALIGNED_KEYS:
        return 0, visible.aligned_end
    elif RUN == WHOLE_KEYS:
        return visible.aligned_end, visible.whole_end
    else:
        return visible.whole_end, visible.end


@triton.jit
def seeing_rows(half, first_key, n_keys, CONSTANTS: tl.constexpr):
    """Return the `SeeingRows` of the segment `half` for the tile of keys that begins with `first_key`.

    Whole blocks end with the segment, and the rows before the first whole block are masked.
    """
    end_key = tl.minimum(first_key + CONSTANTS.BLOCK_N, n_keys)
    begin = tl.maximum(first_key - half.diagonal, 0)  # first token that sees the first key of the tile
    begin = tl.where(first_key < half.kv_len, tl.minimum(begin, half.q_len), half.q_len)
    begin_full = tl.maximum(end_key - 1 - half.diagonal, begin)  # first token that sees them all
    begin_full = tl.where(end_key <= half.kv_len, tl.minimum(begin_full, half.q_len), half.q_len)
    end_row = half.q_len * CONSTANTS.GROUP
    whole_rows = (half.q_len - begin_full) * CONSTANTS.GROUP // CONSTANTS.BLOCK_M * CONSTANTS.BLOCK_M
    whole_begin = end_row - whole_rows
    return SeeingRows(begin=begin * CONSTANTS.GROUP, whole_begin=whole_begin, end=end_row)


@triton.jit
def row_run(seeing, RUN: tl.constexpr):
    """Return (begin, end) of run number `RUN` of blocks of rows."""
    if RUN == EDGE_ROWS:
        return seeing.begin, seeing.whole_begin
    else:
        return seeing.whole_begin, seeing.end
