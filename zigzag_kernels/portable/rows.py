"""The places of query rows and keys in memory, and the functions that load and store tiles of rows."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..segments.lookup import chunk_row
from .arithmetic import cast


class RowPlaces(NamedTuple):
    """The `BLOCK_M` query rows of a tile, and their places in an array of queries."""

    start: tl.tensor  # int64 elements from the beginning of the array to the tile
    offsets: tl.tensor  # [BLOCK_M] elements from the tile to each row
    tokens: tl.tensor  # [BLOCK_M] the token of each row, numbered in the segment


class KeyRows(NamedTuple):
    """The places of one sequence's keys in the K/V buffer."""

    kv_row: tl.tensor  # row of the first key in the first slot
    kv_chunk: tl.tensor  # keys of one chunk
    slot_rows: tl.tensor  # rows of one slot
    place: tl.tensor  # keys between the beginning of the first chunk and the first key


class Keys(NamedTuple):
    """The keys of one sequence for one KV head."""

    k_ptr: tl.tensor  # row 0 of the KV head in K
    v_ptr: tl.tensor  # row 0 of the KV head in V
    n_keys: tl.tensor  # keys from this number on are not read
    rows: KeyRows


class KeyBlock(NamedTuple):
    """K and V of `BLOCK_N` consecutive keys of one sequence."""

    keys: tl.tensor  # [BLOCK_N] numbers of the keys in the sequence
    k: tl.tensor  # [BLOCK_N, BLOCK_D]
    v: tl.tensor  # [BLOCK_N, BLOCK_D]


@triton.jit
def query_places(
    row, q_row, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, STRIDE_T: tl.constexpr, STRIDE_H: tl.constexpr
):
    """Return the `RowPlaces` of the rows from `row` on of the segment whose first token is at local row `q_row`.

    If BLOCK_M is a multiple of GROUP, `row` is a multiple of GROUP too, and every tile has the same offsets.
    """
    inner = tl.arange(0, BLOCK_M)
    if BLOCK_M % GROUP:
        inner += row % GROUP
    first = row // GROUP
    tokens = inner // GROUP
    return RowPlaces(
        # The place of the tile needs 64 bits; offsets within a tile fit into 32 bits, and take half of the registers.
        start=(q_row + first).to(tl.int64) * STRIDE_T,
        offsets=tokens * STRIDE_T + inner % GROUP * STRIDE_H,
        tokens=first + tokens,
    )


@triton.jit
def make_key_rows(kv_row, kv_chunk, slot_rows, place):
    """Return the `KeyRows` of these values, as tensors: a tuple cannot hold the constant that a value may be.

    jax-triton passes a `slot_rows` of 1 as a constant.
    """
    return KeyRows(
        kv_row=kv_row, kv_chunk=kv_chunk, slot_rows=tl.cast(slot_rows, tl.int32), place=tl.cast(place, tl.int32)
    )


@triton.jit
def key_places(key_rows, start, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Return (int64 row, `[BLOCK_N]` distances from that row) of the keys `[start, start + BLOCK_N)` in the K/V buffer.

    With `ALIGNED`, the caller guarantees that chunks are whole blocks. Then no block crosses a chunk border, and the
    distances are the same for all blocks. Without it, a block may cross one or several borders, and the chunk of each
    key is computed. That division is in float32, and exact because BLOCK_N is small.
    """
    kv_row, kv_chunk, slot_rows, place = key_rows
    offsets = tl.arange(0, BLOCK_N)
    if SLOTS == 1:
        # All keys of the sequence lie in position order.
        return (kv_row + start).to(tl.int64), offsets
    elif ALIGNED:
        start += place
        chunk = start // kv_chunk
        # The whole block lies in one chunk: one division finds its rows.
        row = kv_row + chunk_row(chunk, kv_chunk, slot_rows, SLOTS) + start - chunk * kv_chunk
        return row.to(tl.int64), offsets
    else:
        start += place
        first = start // kv_chunk
        left = (first + 1) * kv_chunk - start  # keys of the block that lie in the first chunk
        # `crossed` counts the chunk borders between the block's first key and each key. Half a key is added so that
        # rounding cannot change the floor.
        crossed = tl.floor(((offsets - left).to(tl.float32) + 0.5) * (1.0 / kv_chunk.to(tl.float32))) + 1.0
        chunk = first + tl.where(offsets < left, 0, crossed.to(tl.int32))  # [BLOCK_N]
        rows = offsets + chunk_row(chunk, kv_chunk, slot_rows, SLOTS) + start - chunk * kv_chunk
        return kv_row.to(tl.int64), rows.to(tl.int64)


@triton.jit
def load_keys(keys, start, CONSTANTS: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """Load the `KeyBlock` of the keys `[start, start + BLOCK_N)`.

    With `MASKED`, keys from `n_keys` on are zero; without it, the caller guarantees that the block has no such keys.
    """
    HEAD_DIM: tl.constexpr = CONSTANTS.HEAD_DIM
    BLOCK_D: tl.constexpr = CONSTANTS.BLOCK_D
    STRIDE_KT: tl.constexpr = CONSTANTS.STRIDE_KT
    STRIDE_VT: tl.constexpr = CONSTANTS.STRIDE_VT
    numbers = start + tl.arange(0, CONSTANTS.BLOCK_N)
    row, rows = key_places(keys.rows, start, CONSTANTS.SLOTS, CONSTANTS.BLOCK_N, ALIGNED)
    k_ptr = keys.k_ptr + row * STRIDE_KT
    # K and V have the same rows, but different strides.
    k = load_rows(k_ptr, rows * STRIDE_KT, numbers < keys.n_keys, MASKED, HEAD_DIM, BLOCK_D)
    v_ptr = keys.v_ptr + row * STRIDE_VT
    v = load_rows(v_ptr, rows * STRIDE_VT, numbers < keys.n_keys, MASKED, HEAD_DIM, BLOCK_D)
    return KeyBlock(keys=numbers, k=k, v=v)


@triton.jit
def load_rows(ptr, offsets, inside, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the rows at `offsets` elements from `ptr`: `[len(offsets), BLOCK_D]`, zero from column HEAD_DIM on.

    With `MASKED`, rows that are not `inside` are zero; without it, the caller guarantees that all are inside.
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
def store_rows(ptr, offsets, values, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr):
    """Write the rows that are `inside`, cast to the element type of `ptr`; the inverse of `load_rows`."""
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptr + offsets[:, None] + dims[None, :], cast(values, ptr.dtype.element_ty, INTERPRET), mask=mask)
