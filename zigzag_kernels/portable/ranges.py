"""The masks of the portable kernels: each query row sees one range of keys, its `KeyRange`.

From the ranges of a tile of rows, `visible_keys` derives the blocks of keys that the forward kernel and dQ loop over.
For a tile of keys, `seeing_rows` derives the blocks of rows that dK/dV loop over. Both return several *runs* of blocks,
one after the other; the number of a run says whether its blocks need the mask. The kernels loop over the runs and do
not depend on the shape of the mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..segments.ranges import KeyRange, keys_of_positions, seeing_positions

# Runs of blocks of keys, in this order.
LOW_EDGE_KEYS = tl.constexpr(0)  # some rows do not see some keys; only in ranged masks
ALIGNED_KEYS = tl.constexpr(1)  # every row sees every key, and chunks are whole blocks (see `rows.key_places`)
WHOLE_KEYS = tl.constexpr(2)  # every row sees every key
EDGE_KEYS = tl.constexpr(3)  # some rows do not see some keys
KEY_RUNS = tl.constexpr(4)

# Runs of blocks of query rows, in this order.
EDGE_ROWS = tl.constexpr(0)  # some rows do not see some keys
WHOLE_ROWS = tl.constexpr(1)  # every row sees every key
LATE_EDGE_ROWS = tl.constexpr(2)  # some rows do not see some keys; only in ranged masks
ROW_RUNS = tl.constexpr(3)


class VisibleKeys(NamedTuple):
    """The keys that a tile of query rows sees.

    `by_row` has a range for each row; the other fields bound the runs of blocks of keys. `begin` and `low_end` are used
    only if the mask is ranged. Whole blocks are either all in the run `ALIGNED_KEYS` or all in the run `WHOLE_KEYS`:
    the chunk length decides, and the other run is empty.
    """

    by_row: KeyRange
    begin: tl.tensor
    low_end: tl.tensor
    aligned_end: tl.tensor
    whole_end: tl.tensor
    end: tl.tensor


class SeeingRows(NamedTuple):
    """The bounds of the runs of row blocks, for the rows of a segment that see a tile of keys."""

    begin: tl.tensor
    whole_begin: tl.tensor
    whole_end: tl.tensor
    end: tl.tensor


@triton.jit
def keys_of_rows(tokens, diagonal, kv_len):
    """Return the `KeyRange` of the rows of `tokens` in a segment; the mask is not ranged."""
    end = tl.minimum(diagonal + tokens + 1, kv_len)
    return KeyRange(begin=end, end=end)


@triton.jit
def sees(by_row, keys, RANGED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return whether each row sees each of `keys`: `[rows, keys]`, or `[keys, rows]` if `TRANSPOSED`."""
    if TRANSPOSED:
        seen = keys[:, None] < by_row.end[None, :]
        if RANGED:
            seen = seen & (keys[:, None] >= by_row.begin[None, :])
    else:
        seen = keys[None, :] < by_row.end[:, None]
        if RANGED:
            seen = seen & (keys[None, :] >= by_row.begin[:, None])
    return seen


@triton.jit
def visible_keys(queries, tokens, CONSTANTS: tl.constexpr):
    """Return the `VisibleKeys` of the tile `queries`, whose rows have the `tokens`, numbered in its segment."""
    kv_len = tl.maximum(queries.kv_len, 0)
    # A tile may begin and end within the rows of a token, and the segment may end within the tile.
    first_token = queries.row // CONSTANTS.GROUP
    last_row = tl.minimum(queries.row + CONSTANTS.BLOCK_M - 1, queries.q_len * CONSTANTS.GROUP - 1)
    last_token = last_row // CONSTANTS.GROUP
    # The first row sees the fewest keys, so blocks below its end need no mask; the last row sees the most.
    whole_end = keys_of_rows(first_token, queries.diagonal, kv_len).end // CONSTANTS.BLOCK_N * CONSTANTS.BLOCK_N
    end = keys_of_rows(last_token, queries.diagonal, kv_len).end
    if CONSTANTS.SLOTS == 1:
        # One slot has all keys in position order, so every whole block is aligned.
        aligned_end = whole_end
    else:
        aligned_end = tl.where(queries.kv_chunk % CONSTANTS.BLOCK_N == 0, whole_end, 0)
    by_row = keys_of_rows(tokens, queries.diagonal, kv_len)
    return VisibleKeys(by_row=by_row, begin=end, low_end=end, aligned_end=aligned_end, whole_end=whole_end, end=end)


@triton.jit
def visible_key_range(queries, position, document, tokens, CONSTANTS: tl.constexpr):
    """Return the `VisibleKeys` of the tile `queries` of a `Document` under a ranged mask.

    `position` is the position of the segment's first token; `tokens` has the token of each row of the tile, numbered in
    the segment. Blocks begin at multiples of BLOCK_N keys from the start of the document. So the keys of a row are
    added in the same order, whichever tile contains the row.
    """
    BLOCK_N: tl.constexpr = CONSTANTS.BLOCK_N
    first = position + queries.row // CONSTANTS.GROUP
    last_row = tl.minimum(queries.row + CONSTANTS.BLOCK_M - 1, queries.q_len * CONSTANTS.GROUP - 1)
    last = position + last_row // CONSTANTS.GROUP
    last_real = tl.minimum(last, document.real - 1)  # rows behind it are padding and see nothing
    # Both ends of a range grow with the position: the first row has the lowest range, the last real row the highest.
    lowest = keys_of_positions(first, document, CONSTANTS)
    highest = keys_of_positions(last_real, document, CONSTANTS)
    end = tl.where(first <= last_real, highest.end, 0)  # a tile of padding rows has no keys
    # `begin` is rounded down to whole blocks: the mask hides the keys of the first block that no row sees.
    begin = tl.minimum(lowest.begin, end) // BLOCK_N * BLOCK_N
    # All real rows see the keys from the highest begin to the lowest end. Padding rows see no key, so a tile with
    # padding rows masks all blocks.
    whole_begin = (highest.begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_end = lowest.end // BLOCK_N * BLOCK_N
    # If there is no whole block, as with a very narrow window, all blocks are in the first run, which has the mask.
    has_whole = (whole_begin < whole_end) & (last == last_real)
    low_end = tl.where(has_whole, whole_begin, end)
    whole_end = tl.where(has_whole, whole_end, end)
    if CONSTANTS.SLOTS == 1:
        aligned_end = whole_end
    else:
        # The document's first key lies `place` keys behind the beginning of a chunk. If `place` and the chunk length
        # are multiples of a block, no block crosses a chunk border.
        aligned = (queries.kv_chunk % BLOCK_N == 0) & (document.place % BLOCK_N == 0)
        aligned_end = tl.where(aligned, whole_end, low_end)
    by_row = keys_of_positions(position + tokens, document, CONSTANTS)
    return VisibleKeys(
        by_row=by_row, begin=begin, low_end=low_end, aligned_end=aligned_end, whole_end=whole_end, end=end
    )


@triton.constexpr_function
def has_key_run(RUN, SLOTS, RANGED):
    """Return whether run number `RUN` of blocks of keys can have blocks.

    With one slot, all keys are in position order, so that every whole block is aligned and `WHOLE_KEYS` is empty.
    """
    if LOW_EDGE_KEYS.value == RUN:
        return RANGED
    return SLOTS > 1 or WHOLE_KEYS.value != RUN


@triton.constexpr_function
def is_edge(RUN):
    """Return whether blocks of run number `RUN` need the mask: some rows may not see some keys."""
    return RUN in (LOW_EDGE_KEYS.value, EDGE_KEYS.value)


@triton.jit
def key_run(visible, RANGED: tl.constexpr, RUN: tl.constexpr):
    """Return (begin, end) of run number `RUN` of blocks of keys."""
    if RUN == LOW_EDGE_KEYS:
        return visible.begin, visible.low_end
    elif RUN == ALIGNED_KEYS:
        if RANGED:
            return visible.low_end, visible.aligned_end
        else:
            return 0, visible.aligned_end
    elif RUN == WHOLE_KEYS:
        return visible.aligned_end, visible.whole_end
    else:
        return visible.whole_end, visible.end


@triton.jit
def seeing_rows(half, first_key, n_keys, CONSTANTS: tl.constexpr):
    """Return the `SeeingRows` of the segment `half` for the tile of keys that begins with `first_key`.

    The last whole block ends where the segment ends; the rows before the first whole block need the mask.
    """
    end_key = tl.minimum(first_key + CONSTANTS.BLOCK_N, n_keys)
    begin = tl.maximum(first_key - half.diagonal, 0)  # first token that sees the first key of the tile
    # If no row of this half sees the tile, its range of rows is empty, at the end of the segment.
    begin = tl.where(first_key < half.kv_len, tl.minimum(begin, half.q_len), half.q_len)
    begin_full = tl.maximum(end_key - 1 - half.diagonal, begin)  # first token that sees all keys of the tile
    begin_full = tl.where(end_key <= half.kv_len, tl.minimum(begin_full, half.q_len), half.q_len)
    end_row = half.q_len * CONSTANTS.GROUP
    whole_rows = (half.q_len - begin_full) * CONSTANTS.GROUP // CONSTANTS.BLOCK_M * CONSTANTS.BLOCK_M
    whole_begin = end_row - whole_rows
    return SeeingRows(begin=begin * CONSTANTS.GROUP, whole_begin=whole_begin, whole_end=end_row, end=end_row)


@triton.jit
def seeing_row_range(half, document, first_key, CONSTANTS: tl.constexpr):
    """Return the `SeeingRows` of the segment `half` of a `Document` under a ranged mask.

    The first block begins with the first row that sees a key of the tile.
    """
    BLOCK_M: tl.constexpr = CONSTANTS.BLOCK_M
    position = half.position
    end_key = tl.minimum(first_key + CONSTANTS.BLOCK_N, document.n_keys)
    seeing = seeing_positions(first_key, end_key, document, CONSTANTS)
    # Convert positions to tokens of the segment, clipped to the tokens that are not padding.
    tokens = tl.minimum(tl.maximum(document.real - position, 0), half.q_len)
    begin = tl.minimum(tl.maximum(seeing.begin - position, 0), tokens) * CONSTANTS.GROUP
    end = tl.minimum(tl.maximum(seeing.end - position, 0), tokens) * CONSTANTS.GROUP
    end = tl.maximum(end, begin)
    whole_begin = tl.minimum(tl.maximum(seeing.whole_begin - position, 0), tokens) * CONSTANTS.GROUP
    whole_end = tl.minimum(tl.maximum(seeing.whole_end - position, 0), tokens) * CONSTANTS.GROUP
    first_whole = (tl.maximum(whole_begin - begin, 0) + BLOCK_M - 1) // BLOCK_M
    last_whole = tl.maximum(whole_end - begin, 0) // BLOCK_M
    has_whole = first_whole < last_whole
    return SeeingRows(
        begin=begin,
        whole_begin=tl.where(has_whole, begin + first_whole * BLOCK_M, end),
        whole_end=tl.where(has_whole, begin + last_whole * BLOCK_M, end),
        end=end,
    )


@triton.constexpr_function
def has_row_run(RUN, RANGED):
    """Return whether run number `RUN` of blocks of rows can have blocks."""
    return RANGED or LATE_EDGE_ROWS.value != RUN


@triton.jit
def row_run(seeing, RUN: tl.constexpr):
    """Return (begin, end) of run number `RUN` of blocks of rows."""
    if RUN == EDGE_ROWS:
        return seeing.begin, seeing.whole_begin
    elif RUN == WHOLE_ROWS:
        return seeing.whole_begin, seeing.whole_end
    else:
        return seeing.whole_end, seeing.end
