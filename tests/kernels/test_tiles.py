"""In which order tiles work on the rows of a batch."""

import torch
import triton
import triton.language as tl

from tests.support.machine import GPU
from tests.support.pieces import DEVICE, tensor
from zigzag_kernels import plan
from zigzag_kernels.segments.lookup import load_segment
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
