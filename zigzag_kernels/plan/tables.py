"""The launch of the kernel that builds the segment and sequence tables of a batch."""

from ..checks import check_target
from ..launch import Launch, Output
from ..modes import KVLayout
from ..problem import segment_table_shapes
from ..segments.build import build_segments
from .planner import Planned

ENTRIES = 64  # of a table that one program writes


def make_tables(sequences: int, world_size: int, kv_layout: str, target: str) -> Planned:
    """Return the launch of the tables: see `steps.segment_tables`."""
    check_target(target)
    steps = world_size if kv_layout == KVLayout.PEER else 1
    segments_shape, sequences_shape = segment_table_shapes(sequences, steps)
    launch = Launch(
        kernel=build_segments,
        target=target,
        grid=(-(-segments_shape[-2] // ENTRIES), steps, 1),
        inputs=("cu_seqlens", "rank"),
        scalars={"n_sequences": sequences},
        outputs=(
            Output("segments", segments_shape, "int32"),
            Output("sequences", sequences_shape, "int32"),
        ),
        constexprs={
            "WORLD_SIZE": world_size,
            "PEER": kv_layout == KVLayout.PEER,
            "CONTIGUOUS": kv_layout == KVLayout.CONTIGUOUS,
            "BLOCK": ENTRIES,
        },
    )
    return Planned(None, (launch,))
