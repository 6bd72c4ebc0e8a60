"""The tiles of a grid work on every row of a batch once, and in which order."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.support.machine import GPU
from tests.support.pieces import DEVICE, tensor
from tests.support.problems import hopper_problem, launches
from zigzag_kernels import plan
from zigzag_kernels.segments.columns import HalfColumn, SegmentColumn, SequenceColumn
from zigzag_kernels.segments.lookup import load_segment, load_sequence, tile_and_head
from zigzag_torch import launch


@triton.jit
def _place_of_tile(segments_ptr, n_segments, T, places_ptr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0)
    queries = load_segment(segments_ptr, n_segments, tile, T, True, GROUP, BLOCK_M)
    tl.store(places_ptr + 2 * tile, tl.where(queries.row < queries.q_len * GROUP, queries.q_row, -1))
    tl.store(places_ptr + 2 * tile + 1, queries.row)


def test_the_heaviest_segment_comes_first_and_its_last_rows():
    """Rank 0 of two: chunks of 10 and 4 tokens, of which the late ones see the most keys; two rows are padding."""
    tokens, group, block = 30, 2, 16
    target = launch.target("triton" if GPU else "interpret", torch.device(DEVICE))
    cu_seqlens, rank = tensor([0, 40, 56], "int32"), tensor([0], "int32")
    segments, _ = plan.segment_tables(launch.run, cu_seqlens, rank, sequences=2, world_size=2, target=target)
    tiles = tokens * group // block + len(segments)
    places = torch.empty(tiles, 2, dtype=torch.int32, device=DEVICE)
    _place_of_tile[(tiles,)](segments, len(segments), tokens, places, GROUP=group, BLOCK_M=block)
    found = [(q_row, row) for q_row, row in places.tolist() if q_row >= 0]
    assert found == [(10, 16), (10, 0), (24, 0), (0, 16), (0, 0), (20, 0), (28, 0)]


@pytest.mark.parametrize(
    ("offsets", "form"),
    [([0, 14, 30, 50, 64], {"layout": "row", "row_length": 64}), ([0, 40, 64], {"kv_layout": "halo", "halo": 4})],
    ids=["row", "halo"],
)
def test_segments_whose_last_rows_come_latest_in_their_document_come_first(offsets, form):
    """In the row layout and with halos as well, where longer segments may come before them; rank 0 of two."""
    target = launch.target("triton" if GPU else "interpret", torch.device(DEVICE))
    cu_seqlens, rank, sizes = tensor(offsets, "int32"), tensor([0], "int32"), {"sequences": len(offsets) - 1}
    tables = plan.segment_tables(launch.run, cu_seqlens, rank, **sizes, world_size=2, target=target, **form)
    segments = tables[0].flatten(0, -3)[0] if tables[0].ndim == 3 else tables[0]
    columns = [SegmentColumn.FIRST_POSITION, SegmentColumn.Q_LEN]
    ends = segments[:-1, columns].sum(1)[segments[:-1, SegmentColumn.Q_LEN] > 0].tolist()
    assert len(ends) >= 3
    assert ends == sorted(ends, reverse=True)


def test_in_the_row_layout_the_sequence_with_the_most_rows_on_the_rank_comes_first():
    """Rank 0 of two holds 14, 2, 2 and 14 rows of four documents. The second and third document are the longest."""
    target = launch.target("triton" if GPU else "interpret", torch.device(DEVICE))
    cu_seqlens, rank = tensor([0, 14, 30, 50, 64], "int32"), tensor([0], "int32")
    form = {"sequences": 4, "world_size": 2, "layout": "row", "row_length": 64}
    _, table = plan.segment_tables(launch.run, cu_seqlens, rank, **form, target=target)
    columns = [SequenceColumn.LATE_HALF + HalfColumn.Q_LEN, SequenceColumn.EARLY_HALF + HalfColumn.Q_LEN]
    assert table[:, columns].sum(1).tolist() == [14, 14, 2, 2, 0, 0]
    assert table[:, SequenceColumn.KEYS].tolist() == [14, 14, 16, 20, 0, 0]
    assert table[:, SequenceColumn.KEYS_BEFORE].tolist() == [0, 14, 28, 44, 64, 64]


@triton.jit
def _rows_of_tiles(segments_ptr, n_segments, T, found_ptr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0)
    queries = load_segment(segments_ptr, n_segments, tile, T, True, GROUP, BLOCK_M)
    first = queries.q_row * GROUP + queries.row
    tl.store(found_ptr + 2 * tile, first)
    tl.store(found_ptr + 2 * tile + 1, tl.minimum(first + BLOCK_M, (queries.q_row + queries.q_len) * GROUP))


@triton.jit
def _keys_of_tiles(sequences_ptr, n_sequences, T, found_ptr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr):
    tile = tl.program_id(0)
    keys = load_sequence(sequences_ptr, n_sequences, tile, T, T, SLOTS, BLOCK_N)
    first = keys.kv_row * SLOTS + keys.first_key  # the sequences before this one have so many keys in all slots
    tl.store(found_ptr + 2 * tile, first)
    tl.store(found_ptr + 2 * tile + 1, tl.minimum(first + BLOCK_N, keys.kv_row * SLOTS + keys.n_keys))


def times_worked_on(kernel, made, table, tokens, rows):
    """`[rows]`: how many tiles of one head, in the grid of the launch `made`, work on each row of queries or keys."""
    names = ("GROUP", "BLOCK_M") if kernel is _rows_of_tiles else ("SLOTS", "BLOCK_N")
    tiles = made.grid[0] // made.constexprs["KV_HEADS"]
    found = torch.empty(tiles, 2, dtype=torch.int32, device=DEVICE)
    kernel[(tiles,)](table, len(table), tokens, found, **{name: made.constexprs[name] for name in names})
    times = np.zeros(rows, int)
    for first, end in found.tolist():
        times[first:end] += 1
    return times


@pytest.mark.parametrize(("target", "head_dim"), [("9.0", 64), ("8.6", 256)])
@pytest.mark.parametrize(("sequences", "longest"), [(1, 300), (4, 100), (12, 6), (12, 100)])
def test_a_grid_has_a_tile_for_every_row_whatever_the_lengths(sequences, longest, target, head_dim):
    """And one only. Half of the sequences are empty; there is padding behind the last."""
    rng = np.random.default_rng(0)
    chunks = rng.integers(1, longest, sequences) * (np.arange(sequences) % 2 == 0)
    tokens = 2 * int(chunks.sum()) + 21
    sizes = {"sequences": sequences, "world_size": 2}
    cu_seqlens, rank = tensor(np.cumsum([0, *4 * chunks]), "int32"), tensor([1], "int32")
    backend = launch.target("triton" if GPU else "interpret", torch.device(DEVICE))
    segments, table = plan.segment_tables(launch.run, cu_seqlens, rank, **sizes, target=backend)
    _, forward, _, *keys, queries = launches(hopper_problem(tokens, head_dim, target=target, gluon=False, **sizes))
    for made in (forward, queries):
        rows = tokens * made.constexprs["GROUP"]
        assert (times_worked_on(_rows_of_tiles, made, segments, tokens, rows) == 1).all(), made
    for made in keys:
        assert (times_worked_on(_keys_of_tiles, made, table, tokens, 2 * tokens) == 1).all(), made


@triton.jit
def _tiles_and_heads(found_ptr, KV_HEADS: tl.constexpr, TILES_TOGETHER: tl.constexpr):
    tile, head = tile_and_head(KV_HEADS, TILES_TOGETHER)
    tl.store(found_ptr + 2 * tl.program_id(0), tile)
    tl.store(found_ptr + 2 * tl.program_id(0) + 1, head)


@pytest.mark.parametrize("together", [0, 1, 3])
def test_every_head_has_every_tile_once_in_whatever_order(together):
    heads, tiles = 4, 6
    found = torch.empty(heads * tiles, 2, dtype=torch.int32, device=DEVICE)
    _tiles_and_heads[(heads * tiles,)](found, KV_HEADS=heads, TILES_TOGETHER=together)
    assert sorted(found.tolist()) == [[tile, head] for tile in range(tiles) for head in range(heads)]
