"""The columns of the two segment tables, int32, which one kernel writes and the attention kernels read."""

from enum import IntEnum


class SegmentColumn(IntEnum):
    """Columns of the segment table, which programs with tiles of query rows read.

    The table has one entry for each segment, and a last entry for the padding. One table works for both masks: with a
    causal mask a kernel reads the first `KV_LEN` keys of the sequence, without a mask all `KEYS`.
    """

    TOKENS_BEFORE = 0  # tokens of all entries before this one
    Q_ROW = 1  # first local row
    Q_LEN = 2  # tokens; in the padding entry the local row behind the padding, or 0 for the end of the arrays
    POSITION = 3  # of the first token, in keys of the K/V buffer: this key is the last one that the token sees
    KV_LEN = 4  # no row of the segment sees a later key; -1 in the padding entry if the batch is invalid
    KV_ROW = 5  # row of the sequence's first key, in the first slot of the K/V buffer
    KV_CHUNK = 6  # keys of one chunk
    KEYS = 7
    # Kernels with a ranged mask read the columns below, and neither POSITION nor KV_LEN.
    FIRST_POSITION = 8  # position of the first token in its document, whichever keys the buffer holds
    REAL = 9  # tokens of the document that are not padding
    EARLY_POSITION = 10  # position of the first key of the document's early part in the K/V buffer
    EARLY_KEYS = 11  # keys of the early part; a buffer with all keys of the document has no late part
    LATE_POSITION = 12  # position of the first key of the late part, which follows the early part
    PLACE = 13  # tokens of the packed row that lie before the document; 0 in the document layout


class HalfColumn(IntEnum):
    """Columns of one segment inside an entry of the sequence table, with the meaning they have in `SegmentColumn`."""

    Q_ROW = 0
    Q_LEN = 1
    POSITION = 2
    KV_LEN = 3
    FIRST_POSITION = 4


class SequenceColumn(IntEnum):
    """Columns of the sequence table, which programs with tiles of keys read.

    The table has one entry for each sequence, and a last entry for the padding. A column that `SegmentColumn` also has
    means the same here. The two segments of the sequence follow, each with the columns of `HalfColumn`.
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
