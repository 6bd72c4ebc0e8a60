"""The launches of the kernels that write the segment and sequence tables of a batch."""

from typing import NamedTuple

from ..checks import check_target
from ..launch import Launch, Output
from ..modes import KVLayout, Layout
from ..problem import table_shapes
from ..segments.build import build_segments
from ..segments.halo import build_halos
from .planner import Planned

ENTRIES = 64  # table entries that one program writes


class BatchForm(NamedTuple):
    """The host's values that decide the tables of a batch; `cu_seqlens`, rank and real lengths are on the device."""

    sequences: int
    world_size: int
    kv_layout: str
    layout: str = Layout.DOCUMENT
    row_length: int = 0  # tokens of one packed row on all ranks, in the row layout
    rows: int = 1  # number of packed rows, in the row layout
    has_lengths: bool = False
    first_row: int = 0  # first local row of the batch
    end_row: int = 0  # local row behind the batch; 0 is the end of the arrays
    halo: int = 0  # rows of a halo, with method "halo"
    longest: int = 0  # most real tokens of a document, 0 for no limit, with method "halo"


def make_tables(form: BatchForm, target: str) -> Planned:
    """Return the launches of the tables: see `steps.segment_tables`."""
    check_target(target)
    world_size = form.world_size
    halos = form.kv_layout == KVLayout.HALO and world_size > 1
    peer = form.kv_layout in (KVLayout.PEER, KVLayout.HALO)
    row_layout = form.layout == Layout.ROW and world_size > 1
    if row_layout and form.kv_layout == KVLayout.CONTIGUOUS:
        raise ValueError("layout: expected 'document' with K/V in position order, got 'row'")
    steps = world_size if peer and not halos else 1
    shapes = table_shapes(KVLayout(form.kv_layout), form.sequences, world_size, row_layout)
    outputs = Output("segments", shapes[0], "int32"), Output("sequences", shapes[1], "int32")
    grid = -(-shapes[0][-2] // ENTRIES)
    scalars = {
        "n_sequences": form.sequences + row_layout,
        "row_length": form.row_length if row_layout else 0,
        "total": form.rows * form.row_length if row_layout else 0,
        "first_row": form.first_row,
        "end_row": form.end_row,
        "halo": form.halo,
        "longest": form.longest,
    }
    constexprs = {"WORLD_SIZE": world_size, "ROW": row_layout, "HAS_LENGTHS": form.has_lengths, "BLOCK": ENTRIES}
    own = Launch(
        kernel=build_segments,
        target=target,
        grid=(grid, steps, 1),
        inputs=("cu_seqlens", "rank", "lengths"),
        scalars=scalars,
        outputs=outputs,
        constexprs=constexprs | {"PEER": peer, "CONTIGUOUS": form.kv_layout == KVLayout.CONTIGUOUS, "HALO": halos},
    )
    if not halos:
        return Planned(None, (own,))
    of_halos = Launch(
        kernel=build_halos,
        target=target,
        grid=(grid, 1, 1),
        inputs=("cu_seqlens", "rank", "lengths", "into_segments", "into_sequences"),
        scalars=scalars,
        outputs=outputs,
        constexprs=constexprs,
        in_place={"segments": "into_segments", "sequences": "into_sequences"},
    )
    return Planned(None, (own, of_halos))
