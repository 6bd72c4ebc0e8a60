"""The mathematics that the attention kernels share: which rows a tile owns, which keys they see, and the products.

Words used here and in the other kernel files (`layout.py` has the layout itself):

- *segment*: a run of query rows at consecutive positions of one sequence. A zigzag rank holds two per sequence.
- *row*: with grouped-query attention the `GROUP` query heads of one KV head are rows of one tile, so that a segment of
  `n` tokens has `n * GROUP` rows: row `r` is token `r // GROUP`, head `r % GROUP`. Short chunks fill tiles that way,
  and K/V are read once for the group.
- *key*: an index into the keys of one sequence, in position order. Row `r` of a segment sees the keys
  `[0, min(kv_len, diagonal + token + 1))`; without a causal mask `diagonal` is `kv_len`, which hides nothing.
  In a segment with `kv_len > 0` every row sees key 0, so a running maximum is finite after the first block.
- *slot*: a K/V buffer is `SLOTS` slots of `slot_rows` rows. Gathered K/V have one slot a rank, each with its early and
  its late chunks; in the other layouts all keys of a sequence follow each other, in one slot.
- *window*: K/V of a few KV heads at a time, those from `first_kv_head` on; queries and results have all heads.
"""

import triton
import triton.language as tl

from . import problem

# An entry of the segment table: row_start, q_row, q_len, position, kv_len, kv_row, kv_chunk, keys. Under a causal mask
# the first `kv_len` keys count, without one all `keys`: one table serves both.
SEGMENT_FIELDS = tl.constexpr(problem.SEGMENT_FIELDS)
# An entry of the sequence table: key_start, kv_row, kv_chunk, keys, then twice q_row, q_len, position, kv_len.
SEQUENCE_FIELDS = tl.constexpr(problem.SEQUENCE_FIELDS)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(table_ptr, n_entries, tile, FIELDS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Entry that tile `tile` works on, and the number of the tile inside it.

    Field 0 of an entry counts the tokens of all entries before it. Entry `e` owns the tiles from
    `tokens_before * GROUP // BLOCK + e` on: at least as many as its own rows fill, whatever the lengths, so that the
    table does not depend on the tile size and at most one tile an entry finds nothing to do.
    """
    low = 0
    high = n_entries - 1
    while low < high:
        step = (high - low) // 4 + 1
        passed = 0
        for i in tl.static_range(1, 4):  # three loads that do not wait for each other
            entry = tl.minimum(low + i * step, high)
            mine = tl.load(table_ptr + entry * FIELDS) * GROUP // BLOCK + entry <= tile
            passed += (mine & (low + i * step <= high)).to(tl.int32)
        low += passed * step
        high = tl.minimum(low + step - 1, high)
    return low, tile - (tl.load(table_ptr + low * FIELDS) * GROUP // BLOCK + low)


@triton.jit
def tile_and_head(KV_HEADS: tl.constexpr, TILES_TOGETHER: tl.constexpr):
    """(tile, KV head of the window) of this program: `TILES_TOGETHER` tiles of one head (0: all of them) come before
    those of the next head."""
    program = tl.program_id(0)
    if TILES_TOGETHER == 0:
        tiles = tl.num_programs(0) // KV_HEADS
        return program % tiles, program // tiles
    else:
        head = program // TILES_TOGETHER
        return head // KV_HEADS * TILES_TOGETHER + program % TILES_TOGETHER, head % KV_HEADS


@triton.jit
def load_segment(segments_ptr, n_segments, tile, T, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first row of this tile, q_row, q_len, diagonal, kv_len, kv_row, kv_chunk) of query tile `tile`.

    The last tile of a segment comes first: under a causal mask it is the heaviest, and light ones fill the last gaps.

    The last entry is the padding behind the last sequence: its length is known here only (`T` is not in the table),
    and `kv_len < 0` there means that the table's maker found the lengths or the rank impossible. Then, and when the
    sequences need more rows than there are, that entry is all there is, and its rows become NaN.
    """
    last_ptr = segments_ptr + (n_segments - 1) * SEGMENT_FIELDS
    used = tl.load(last_ptr + 1)
    segment, block = locate(segments_ptr, n_segments, tile, SEGMENT_FIELDS, GROUP, BLOCK_M)
    overfull = used > T
    segment = tl.where(overfull, n_segments - 1, segment)
    block = tl.where(overfull, tile, block)
    padding = segment == n_segments - 1
    entry_ptr = segments_ptr + segment * SEGMENT_FIELDS
    q_row = tl.where(overfull, 0, tl.load(entry_ptr + 1))
    q_len = tl.where(padding, T - q_row, tl.load(entry_ptr + 2))
    kv_len = tl.where(overfull, -1, tl.load(entry_ptr + (4 if CAUSAL else 7)))
    diagonal = tl.load(entry_ptr + 3) if CAUSAL else kv_len
    last_block = (q_len * GROUP - 1) // BLOCK_M
    block = tl.where(block <= last_block, last_block - block, block)
    return block * BLOCK_M, q_row, q_len, diagonal, kv_len, tl.load(entry_ptr + 5), tl.load(entry_ptr + 6)


@triton.jit
def load_sequence(sequences_ptr, n_sequences, tile, slot_rows, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(entry, first key of this tile, keys, kv_row, kv_chunk, whether all becomes NaN) of key tile `tile`.

    The padding entry and impossible tables are as in `load_segment`.
    """
    used = tl.load(sequences_ptr + (n_sequences - 1) * SEQUENCE_FIELDS + 1)
    sequence, block = locate(sequences_ptr, n_sequences, tile, SEQUENCE_FIELDS, 1, BLOCK_N)
    overfull = used > slot_rows
    sequence = tl.where(overfull, n_sequences - 1, sequence)
    block = tl.where(overfull, tile, block)
    entry_ptr = sequences_ptr + sequence * SEQUENCE_FIELDS
    kv_row = tl.where(overfull, 0, tl.load(entry_ptr + 1))
    padding = sequence == n_sequences - 1
    poison = overfull | (tl.load(entry_ptr + 3) < 0)
    # Padding has slot_rows - used rows in each of the SLOTS slots: a sequence of that many early chunks.
    kv_chunk = tl.where(padding, slot_rows - kv_row, tl.load(entry_ptr + 2))
    n_keys = tl.where(padding, kv_chunk * SLOTS, tl.load(entry_ptr + 3))
    return entry_ptr, block * BLOCK_N, n_keys, kv_row, kv_chunk, poison


@triton.jit
def chunk_row(chunk, kv_chunk, slot_rows, SLOTS: tl.constexpr):
    """First row of chunk number `chunk` of a sequence, behind the sequence's first row in the gathered buffer."""
    return tl.where(chunk < SLOTS, chunk * slot_rows, (2 * SLOTS - 1 - chunk) * slot_rows + kv_chunk)


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
