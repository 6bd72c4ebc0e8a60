"""The entries of both segment tables, and the device functions that store them."""

from typing import NamedTuple

import triton
import triton.language as tl

from .fields import (
    HALF_FIELDS,
    HALF_FIRST_POSITION,
    HALF_KV_LEN,
    HALF_POSITION,
    HALF_Q_LEN,
    HALF_Q_ROW,
    SEGMENT_EARLY_KEYS,
    SEGMENT_EARLY_POSITION,
    SEGMENT_FIRST_POSITION,
    SEGMENT_KEYS,
    SEGMENT_KV_CHUNK,
    SEGMENT_KV_LEN,
    SEGMENT_KV_ROW,
    SEGMENT_LATE_POSITION,
    SEGMENT_PLACE,
    SEGMENT_POSITION,
    SEGMENT_Q_LEN,
    SEGMENT_Q_ROW,
    SEGMENT_REAL,
    SEGMENT_TOKENS_BEFORE,
    SEQUENCE_EARLY_KEYS,
    SEQUENCE_EARLY_POSITION,
    SEQUENCE_HALVES,
    SEQUENCE_KEYS,
    SEQUENCE_KEYS_BEFORE,
    SEQUENCE_KV_CHUNK,
    SEQUENCE_KV_ROW,
    SEQUENCE_LATE_POSITION,
    SEQUENCE_PLACE,
    SEQUENCE_REAL,
)


class Keys(NamedTuple):
    """The columns of `[BLOCK]` entries that say where keys are; both tables have them."""

    kv_row: tl.tensor
    kv_chunk: tl.tensor
    keys: tl.tensor
    real: tl.tensor
    early_position: tl.tensor
    early_keys: tl.tensor
    late_position: tl.tensor
    place: tl.tensor


class Rows(NamedTuple):
    """The columns of `[BLOCK]` segments that say which rows they have, and which keys these rows see."""

    q_row: tl.tensor
    q_len: tl.tensor
    position: tl.tensor
    kv_len: tl.tensor
    first_position: tl.tensor


@triton.jit
def store_segments(ptrs, tokens_before, rows, keys, mask):
    """Store entries of the segment table at `ptrs`."""
    tl.store(ptrs + SEGMENT_TOKENS_BEFORE, tokens_before, mask=mask)
    tl.store(ptrs + SEGMENT_Q_ROW, rows.q_row, mask=mask)
    tl.store(ptrs + SEGMENT_Q_LEN, rows.q_len, mask=mask)
    tl.store(ptrs + SEGMENT_POSITION, rows.position, mask=mask)
    tl.store(ptrs + SEGMENT_KV_LEN, rows.kv_len, mask=mask)
    tl.store(ptrs + SEGMENT_KV_ROW, keys.kv_row, mask=mask)
    tl.store(ptrs + SEGMENT_KV_CHUNK, keys.kv_chunk, mask=mask)
    tl.store(ptrs + SEGMENT_KEYS, keys.keys, mask=mask)
    tl.store(ptrs + SEGMENT_FIRST_POSITION, rows.first_position, mask=mask)
    tl.store(ptrs + SEGMENT_REAL, keys.real, mask=mask)
    tl.store(ptrs + SEGMENT_EARLY_POSITION, keys.early_position, mask=mask)
    tl.store(ptrs + SEGMENT_EARLY_KEYS, keys.early_keys, mask=mask)
    tl.store(ptrs + SEGMENT_LATE_POSITION, keys.late_position, mask=mask)
    tl.store(ptrs + SEGMENT_PLACE, keys.place, mask=mask)


@triton.jit
def store_sequences(ptrs, keys_before, keys, mask):
    """Store entries of the sequence table at `ptrs`, except the rows of their segments."""
    tl.store(ptrs + SEQUENCE_KEYS_BEFORE, keys_before, mask=mask)
    tl.store(ptrs + SEQUENCE_KV_ROW, keys.kv_row, mask=mask)
    tl.store(ptrs + SEQUENCE_KV_CHUNK, keys.kv_chunk, mask=mask)
    tl.store(ptrs + SEQUENCE_KEYS, keys.keys, mask=mask)
    tl.store(ptrs + SEQUENCE_REAL, keys.real, mask=mask)
    tl.store(ptrs + SEQUENCE_EARLY_POSITION, keys.early_position, mask=mask)
    tl.store(ptrs + SEQUENCE_EARLY_KEYS, keys.early_keys, mask=mask)
    tl.store(ptrs + SEQUENCE_LATE_POSITION, keys.late_position, mask=mask)
    tl.store(ptrs + SEQUENCE_PLACE, keys.place, mask=mask)


@triton.jit
def store_half(ptrs, half, rows, mask):
    """Store the rows of segments in entries of the sequence table: of late ones if `half` is 0, otherwise early."""
    ptrs += SEQUENCE_HALVES + HALF_FIELDS * half
    tl.store(ptrs + HALF_Q_ROW, rows.q_row, mask=mask)
    tl.store(ptrs + HALF_Q_LEN, rows.q_len, mask=mask)
    tl.store(ptrs + HALF_POSITION, rows.position, mask=mask)
    tl.store(ptrs + HALF_KV_LEN, rows.kv_len, mask=mask)
    tl.store(ptrs + HALF_FIRST_POSITION, rows.first_position, mask=mask)
