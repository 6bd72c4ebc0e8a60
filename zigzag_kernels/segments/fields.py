"""The columns of both tables as constants for kernels: `columns.py` says what the columns hold.

Kernels import each constant by its own name, because Triton's cache key covers only global constants. If a kernel read
a column through a module or a class (`fields.Q_ROW`), Triton might run a cached kernel that has old column numbers.
"""

import triton.language as tl

from . import columns
from .columns import HalfColumn, SegmentColumn, SequenceColumn

SEGMENT_TOKENS_BEFORE = tl.constexpr(SegmentColumn.TOKENS_BEFORE.value)
SEGMENT_Q_ROW = tl.constexpr(SegmentColumn.Q_ROW.value)
SEGMENT_Q_LEN = tl.constexpr(SegmentColumn.Q_LEN.value)
SEGMENT_POSITION = tl.constexpr(SegmentColumn.POSITION.value)
SEGMENT_KV_LEN = tl.constexpr(SegmentColumn.KV_LEN.value)
SEGMENT_KV_ROW = tl.constexpr(SegmentColumn.KV_ROW.value)
SEGMENT_KV_CHUNK = tl.constexpr(SegmentColumn.KV_CHUNK.value)
SEGMENT_KEYS = tl.constexpr(SegmentColumn.KEYS.value)
SEGMENT_FIRST_POSITION = tl.constexpr(SegmentColumn.FIRST_POSITION.value)
SEGMENT_REAL = tl.constexpr(SegmentColumn.REAL.value)
SEGMENT_EARLY_POSITION = tl.constexpr(SegmentColumn.EARLY_POSITION.value)
SEGMENT_EARLY_KEYS = tl.constexpr(SegmentColumn.EARLY_KEYS.value)
SEGMENT_LATE_POSITION = tl.constexpr(SegmentColumn.LATE_POSITION.value)
SEGMENT_PLACE = tl.constexpr(SegmentColumn.PLACE.value)
SEGMENT_FIELDS = tl.constexpr(columns.SEGMENT_FIELDS)

SEQUENCE_KEYS_BEFORE = tl.constexpr(SequenceColumn.KEYS_BEFORE.value)
SEQUENCE_KV_ROW = tl.constexpr(SequenceColumn.KV_ROW.value)
SEQUENCE_KV_CHUNK = tl.constexpr(SequenceColumn.KV_CHUNK.value)
SEQUENCE_KEYS = tl.constexpr(SequenceColumn.KEYS.value)
SEQUENCE_REAL = tl.constexpr(SequenceColumn.REAL.value)
SEQUENCE_EARLY_POSITION = tl.constexpr(SequenceColumn.EARLY_POSITION.value)
SEQUENCE_EARLY_KEYS = tl.constexpr(SequenceColumn.EARLY_KEYS.value)
SEQUENCE_LATE_POSITION = tl.constexpr(SequenceColumn.LATE_POSITION.value)
SEQUENCE_PLACE = tl.constexpr(SequenceColumn.PLACE.value)
SEQUENCE_HALVES = tl.constexpr(SequenceColumn.LATE_HALF.value)
SEQUENCE_FIELDS = tl.constexpr(columns.SEQUENCE_FIELDS)

HALF_Q_ROW = tl.constexpr(HalfColumn.Q_ROW.value)
HALF_Q_LEN = tl.constexpr(HalfColumn.Q_LEN.value)
HALF_POSITION = tl.constexpr(HalfColumn.POSITION.value)
HALF_KV_LEN = tl.constexpr(HalfColumn.KV_LEN.value)
HALF_FIRST_POSITION = tl.constexpr(HalfColumn.FIRST_POSITION.value)
HALF_FIELDS = tl.constexpr(len(HalfColumn))
