"""The columns of the two segment tables, int32: a kernel writes the tables, and the attention kernels read them."""

from enum import IntEnum


class SegmentColumn(IntEnum):
    """Columns of the segment table, which tiles of query rows read: one entry a segment, then the padding.

    The two numbers of keys let one table serve both masks: under a causal mask the first `KV_LEN` keys of the sequence
    count, without a mask all `KEYS`.
    """

    TOKENS_BEFORE = 0  # tokens of all entries before this one
    Q_ROW = 1  # first local row
    Q_LEN = 2  # tokens
    POSITION = 3  # of the first token, which sees the key at the same position last
    KV_LEN = 4
    KV_ROW = 5  # of the sequence's first key, in the first slot of the K/V buffer
    KV_CHUNK = 6  # keys of one chunk
    KEYS = 7


class HalfColumn(IntEnum):
    """Columns of one segment inside an entry of the sequence table; they mean what `SegmentColumn` says."""

    Q_ROW = 0
    Q_LEN = 1
    POSITION = 2
    KV_LEN = 3


class SequenceColumn(IntEnum):
    """Columns of the sequence table, which tiles of keys read: one entry a sequence, then the padding.

    `KV_ROW`, `KV_CHUNK` and `KEYS` mean what `SegmentColumn` says. The two segments of the sequence follow, each with
    the columns of `HalfColumn`.
    """

    KEYS_BEFORE = 0  # keys of all entries before this one
    KV_ROW = 1
    KV_CHUNK = 2
    KEYS = 3
    LATE_HALF = 4
    EARLY_HALF = LATE_HALF + len(HalfColumn)


SEGMENT_FIELDS = len(SegmentColumn)
SEQUENCE_FIELDS = SequenceColumn.EARLY_HALF + len(HalfColumn)
