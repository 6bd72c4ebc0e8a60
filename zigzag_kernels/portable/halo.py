"""The kernels that copy rows of K/V into messages and halos, and add their gradients to dK and dV.

Grid: tiles of rows × KV heads.
"""

import triton
import triton.language as tl

from ..segments.fields import (
    SEGMENT_FIELDS,
    SEGMENT_KV_CHUNK,
    SEGMENT_KV_ROW,
    SEGMENT_PLACE,
    SEGMENT_Q_LEN,
    SEGMENT_Q_ROW,
)
from ..segments.lookup import locate, tables_are_invalid
from .rows import load_rows, store_rows


@triton.jit
def _rows_of_tile(segments_ptr, n_segments, T, first_row, BLOCK: tl.constexpr):
    """Find the rows of this program's tile, in K/V and in a slot of the buffer.

    Return (rows of K/V `[BLOCK]` int64, rows of the slot `[BLOCK]`, whether the slot belongs to a late chunk, a mask
    `[BLOCK]` that is false for rows that do not exist). With invalid tables no row exists.
    """
    # GROUP is 1, because the tiles are rows of K/V, not of query heads.
    entry, block = locate(segments_ptr, n_segments, tl.program_id(0), SEGMENT_FIELDS, 1, BLOCK)
    entry_ptr = segments_ptr + entry * SEGMENT_FIELDS
    rows = block * BLOCK + tl.arange(0, BLOCK)
    # The last entry is the padding; no neighbour needs its rows.
    no_run = (entry == n_segments - 1) | tables_are_invalid(segments_ptr, n_segments, T)
    inside = rows < tl.where(no_run, 0, tl.load(entry_ptr + SEGMENT_Q_LEN))
    # The four slots are like four chunks of one document: early halo and early rows are chunks 0 and 1, late halo and
    # late rows are chunks 2 and 3.
    late = tl.load(entry_ptr + SEGMENT_PLACE) >= 2 * tl.load(entry_ptr + SEGMENT_KV_CHUNK)
    kv_rows = (tl.load(entry_ptr + SEGMENT_Q_ROW) - first_row + rows).to(tl.int64)
    return kv_rows, tl.load(entry_ptr + SEGMENT_KV_ROW) + rows, late, inside


@triton.jit
def _load_tile(
    k_ptr,
    v_ptr,
    segments_ptr,
    n_segments,
    T,
    first_row,
    HEAD_DIM: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return (K, V, rows of the slot, late, inside) of this program's tile and head; see `_rows_of_tile`."""
    head = tl.program_id(1).to(tl.int64)
    kv_rows, rows, late, inside = _rows_of_tile(segments_ptr, n_segments, T, first_row, BLOCK)
    k = load_rows(k_ptr + head * STRIDE_KH, kv_rows * STRIDE_KT, inside, True, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + head * STRIDE_VH, kv_rows * STRIDE_VT, inside, True, HEAD_DIM, BLOCK_D)
    return k, v, rows, late, inside


@triton.jit
def _store_tile(k_ptr, v_ptr, places, k, v, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows (K, V) that are `inside`, at `places` elements from `k_ptr` and `v_ptr`, in the same dtype."""
    mask = inside[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    places = places[:, None] + tl.arange(0, BLOCK_D)[None, :]
    tl.store(k_ptr + places, k, mask=mask)
    tl.store(v_ptr + places, v, mask=mask)


@triton.jit(do_not_specialize=["n_segments", "T", "first_row", "slot_rows"])
def copy_halo_rows(
    k_ptr,  # [rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    segments_ptr,  # tables 1 and 2 of `segments.halo`
    n_segments,
    T,
    first_row,  # local row of the first row of k, v, and of dk and dv
    slot_rows,
    rows_ptr,  # [6 * slot_rows, 2 * KV_HEADS, HEAD_DIM]: K, then V
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY_ROWS: tl.constexpr,
    LATE_ROWS: tl.constexpr,
    EARLY_SENT: tl.constexpr,
    LATE_SENT: tl.constexpr,
):
    """Copy the first rows and the last rows of chunks to slots of the buffer of halos.

    The first rows of a chunk need a halo; its last rows become the halo of a neighbour. The third dimension of the grid
    chooses between first rows (0) and last rows (1); `zigzag_kernels.halo.HaloSlot` names the slots.
    """
    head, sent = tl.program_id(1).to(tl.int64), tl.program_id(2)
    segments_ptr += sent * n_segments * SEGMENT_FIELDS
    k, v, rows, late, inside = _load_tile(
        k_ptr, v_ptr, segments_ptr, n_segments, T, first_row, HEAD_DIM, STRIDE_KT, STRIDE_KH, STRIDE_VT, STRIDE_VH,
        BLOCK, BLOCK_D,
    )  # fmt: skip
    slot = tl.where(sent == 0, tl.where(late, LATE_ROWS, EARLY_ROWS), tl.where(late, LATE_SENT, EARLY_SENT))
    # A row of the buffer has the heads of K, then the heads of V, so that one message carries both.
    places = ((slot * slot_rows + rows).to(tl.int64) * 2 * KV_HEADS + head) * HEAD_DIM
    _store_tile(rows_ptr, rows_ptr + KV_HEADS * HEAD_DIM, places, k, v, inside, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["n_segments", "T", "first_row"])
def copy_sent_rows(
    k_ptr,  # [rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    segments_ptr,  # table 2 of `segments.halo`
    n_segments,
    T,
    first_row,  # local row of the first row of k, v, and of dk and dv
    early_ptr,  # [slot_rows, 2 * KV_HEADS, HEAD_DIM]: K, then V
    late_ptr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy the last rows of early and of late chunks, which become halos of neighbours, to one message each."""
    head = tl.program_id(1).to(tl.int64)
    k, v, rows, late, inside = _load_tile(
        k_ptr, v_ptr, segments_ptr, n_segments, T, first_row, HEAD_DIM, STRIDE_KT, STRIDE_KH, STRIDE_VT, STRIDE_VH,
        BLOCK, BLOCK_D,
    )  # fmt: skip
    places = (rows.to(tl.int64) * 2 * KV_HEADS + head) * HEAD_DIM
    sent_ptr = tl.where(late, late_ptr, early_ptr)
    _store_tile(sent_ptr, sent_ptr + KV_HEADS * HEAD_DIM, places, k, v, inside, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["n_segments", "T", "first_row", "slot_rows"])
def fill_halo_buffer(
    k_ptr,  # [rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    segments_ptr,  # table 1 of `segments.halo`
    early_ptr,  # [slot_rows, 2 * KV_HEADS, HEAD_DIM]: the messages of neighbours
    late_ptr,
    n_segments,
    T,
    first_row,  # local row of the first row of k, v, and of dk and dv
    slot_rows,
    k_rows_ptr,  # [4 * slot_rows, KV_HEADS, HEAD_DIM]
    v_rows_ptr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY_HALO: tl.constexpr,
    LATE_HALO: tl.constexpr,
    EARLY_ROWS: tl.constexpr,
    LATE_ROWS: tl.constexpr,
):
    """Copy the first rows of chunks, and both halos, to K and V of the buffer of halos.

    The third dimension of the grid chooses between first rows (0) and halos (1).
    """
    head = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        k, v, rows, late, inside = _load_tile(
            k_ptr, v_ptr, segments_ptr, n_segments, T, first_row, HEAD_DIM, STRIDE_KT, STRIDE_KH, STRIDE_VT, STRIDE_VH,
            BLOCK, BLOCK_D,
        )  # fmt: skip
        rows += tl.where(late, LATE_ROWS, EARLY_ROWS) * slot_rows
    else:
        tiles = tl.cdiv(slot_rows, BLOCK)  # of one halo
        late = tl.program_id(0) >= tiles
        halo_ptr = tl.where(late, late_ptr, early_ptr)
        rows = (tl.program_id(0) - tl.where(late, tiles, 0)) * BLOCK + tl.arange(0, BLOCK)
        inside = rows < slot_rows
        sources = (rows.to(tl.int64) * 2 * KV_HEADS + head) * HEAD_DIM
        k = load_rows(halo_ptr, sources, inside, True, HEAD_DIM, BLOCK_D)
        v = load_rows(halo_ptr + KV_HEADS * HEAD_DIM, sources, inside, True, HEAD_DIM, BLOCK_D)
        rows += tl.where(late, LATE_HALO, EARLY_HALO) * slot_rows
    places = (rows.to(tl.int64) * KV_HEADS + head) * HEAD_DIM
    _store_tile(k_rows_ptr, v_rows_ptr, places, k, v, inside, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["n_segments", "T", "first_row", "slot_rows"])
def add_halo_rows(
    early_dk_ptr,  # [slots * slot_rows, KV_HEADS, HEAD_DIM], with STRIDE_ROW elements from row to row
    early_dv_ptr,  # the same from its element FIRST_DV on
    late_dk_ptr,
    late_dv_ptr,
    segments_ptr,  # table 1 or 2 of `segments.halo`
    into_dk_ptr,  # the same memory as dk and dv, or unused
    into_dv_ptr,
    n_segments,
    T,
    first_row,  # local row of the first row of k, v, and of dk and dv
    slot_rows,
    dk_ptr,  # [rows, KV_HEADS, HEAD_DIM]
    dv_ptr,
    EARLY_SLOT: tl.constexpr,
    LATE_SLOT: tl.constexpr,
    STRIDE_ROW: tl.constexpr,
    FIRST_DV: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add the gradients of early and of late chunks to dK and dV of the rows that the table names.

    The table names each row once, so that no two programs add to the same row.
    """
    head = tl.program_id(1).to(tl.int64)
    kv_rows, rows, late, inside = _rows_of_tile(segments_ptr, n_segments, T, first_row, BLOCK)
    places = (kv_rows * KV_HEADS + head) * HEAD_DIM
    sources = (tl.where(late, LATE_SLOT, EARLY_SLOT) * slot_rows + rows).to(tl.int64) * STRIDE_ROW + head * HEAD_DIM
    more_dk = load_rows(tl.where(late, late_dk_ptr, early_dk_ptr), sources, inside, True, HEAD_DIM, BLOCK_D)
    more_dv = load_rows(tl.where(late, late_dv_ptr, early_dv_ptr), FIRST_DV + sources, inside, True, HEAD_DIM, BLOCK_D)
    # The sum is computed in float32 and rounded once, whatever the dtype of dK and dV.
    dk = load_rows(dk_ptr, places, inside, True, HEAD_DIM, BLOCK_D).to(tl.float32) + more_dk.to(tl.float32)
    store_rows(dk_ptr, places, dk, inside, HEAD_DIM, BLOCK_D, INTERPRET)
    dv = load_rows(dv_ptr, places, inside, True, HEAD_DIM, BLOCK_D).to(tl.float32) + more_dv.to(tl.float32)
    store_rows(dv_ptr, places, dv, inside, HEAD_DIM, BLOCK_D, INTERPRET)
