"""The launch of the kernel that builds the segment and sequence tables of a batch."""

from typing import NamedTuple

from ..checks import check_target
from ..launch import Launch, Output
from ..modes import KVLayout, Layout
from ..problem import segment_table_shapes
from ..segments.build import build_segments
from .planner import Planned

ENTRIES = 64  # of a table that one program writes


class BatchForm(NamedTuple):
    """What decides the tables of a batch, besides `cu_seqlens`, the rank and real lengths."""

    sequences: int
    world_size: int
    kv_layout: str
    layout: str = Layout.DOCUMENT
    row_length: int = 0  # tokens of one packed row on all ranks, in the row layout
    rows: int = 1
    has_lengths: bool = False
    first_row: int = 0  # of the local rows that the batch has
    end_row: int = 0  # behind these rows; 0 is the end of the arrays


def make_tables(form: BatchForm, target: str) -> Planned:
    """Return the launch of the tables: see `steps.segment_tables`."""
    check_target(target)
    peer, world_size = form.kv_layout == KVLayout.PEER, form.world_size
    row_layout = form.layout == Layout.ROW and world_size > 1
    if row_layout and form.kv_layout == KVLayout.CONTIGUOUS:
        raise ValueError("layout: expected 'document' with K/V in position order, got 'row'")
    steps = world_size if peer else 1
    segments_shape, sequences_shape = segment_table_shapes(form.sequences, steps, row_layout)
    launch = Launch(
        kernel=build_segments,
        target=target,
        grid=(-(-segments_shape[-2] // ENTRIES), steps, 1),
        inputs=("cu_seqlens", "rank", "lengths"),
        scalars={
            "n_sequences": form.sequences + row_layout,
            "row_length": form.row_length if row_layout else 0,
            "total": form.rows * form.row_length if row_layout else 0,
            "first_row": form.first_row,
            "end_row": form.end_row,
        },
        outputs=(
            Output("segments", segments_shape, "int32"),
            Output("sequences", sequences_shape, "int32"),
        ),
        constexprs={
            "WORLD_SIZE": world_size,
            "PEER": peer,
            "CONTIGUOUS": form.kv_layout == KVLayout.CONTIGUOUS,
            "ROW": row_layout,
            "HAS_LENGTHS": form.has_lengths,
            "BLOCK": ENTRIES,
        },
    )
    return Planned(None, (launch,))
