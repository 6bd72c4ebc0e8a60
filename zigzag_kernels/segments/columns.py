"""The columns of the two segment tables, int32, which one kernel writes and the attention kernels read."""

from enum import IntEnum


class SegmentColumn(IntEnum):
    """Columns of the segment table, which tiles of query rows read: one entry a segment, then the padding.

    Two numbers of keys let one table serve both masks: under a causal mask a kernel reads the first `KV_LEN` keys of
    the sequence, without a mask all `KEYS`.
    """

    TOKENS_BEFORE = 0  # tokens of all entries before this one
    Q_ROW = 1  # first local row
    Q_LEN = 2  # tokens; of the padding the local row behind it, or 0 where arrays end with it
    POSITION = 3  # of the first token; the last key that it sees has the same position
    KV_LEN = 4
    KV_ROW = 5  # of the sequence's first key, in the first slot of the K/V buffer
    KV_CHUNK = 6  # keys of one chunk
    KEYS = 7
    # Kernels with a ranged mask read the columns below, and neither POSITION nor KV_LEN.
    FIRST_POSITION = 8  # of the first token in its document, also for the keys of a peer
    REAL = 9  # tokens of the document that are not padding
    EARLY_POSITION = 10  # of the first key of the document's early part in the K/V buffer
    EARLY_KEYS = 11  # keys of the early part; in a buffer of all keys the early part has all of them
    LATE_POSITION = 12  # of the first key of the late part, which follows the early part
    PLACE = 13  # tokens of the packed row that lie before the document; 0 where documents are cut


class HalfColumn(IntEnum):
    """Columns of one segment inside an entry of the sequence table; they mean what `SegmentColumn` says."""

    Q_ROW = 0
    Q_LEN = 1
    POSITION = 2
    KV_LEN = 3
    FIRST_POSITION = 4


class SequenceColumn(IntEnum):
    """Columns of the sequence table, which tiles of keys read: one entry a sequence, then the padding.

    Columns with names of `SegmentColumn` mean what it says. The two segments of the sequence follow, each with the
    columns of `HalfColumn`.
    """

    KEYS_BEFORE = 0  # keys of all entries before this one
    KV_ROW = 1
    KV_CHUNK = 2
    KEYS = 3
    REAL = 4
    EARLY_POSITION = 5
    EARLY_KEYS = 6
    LATE_POSITION = 7
    PLACE = 8
    LATE_HALF = 9
    EARLY_HALF = LATE_HALF + len(HalfColumn)


SEGMENT_FIELDS = len(SegmentColumn)
SEQUENCE_FIELDS = SequenceColumn.EARLY_HALF + len(HalfColumn)
