"""The tiles of a launch and the programs that take them: their number, their order, and the heads of each."""

import math
from dataclasses import replace

from ..heuristics import FEW_PROGRAMS, MANY_PROGRAMS, MULTIPROCESSORS
from ..modes import KVLayout, Operation
from ..problem import Problem
from ..tiles.config import TileConfig, block_d


def count_tiles(problem: Problem, operation: Operation, config: TileConfig) -> int:
    """Return the tiles of one KV head: an upper bound from static shapes alone, see `segments.lookup.locate`."""
    segments, sequences = problem.table_entries
    if operation.owns_keys:
        return problem.kv_tokens // config.BLOCK_N + sequences
    return problem.most_query_rows * problem.group // config.BLOCK_M + segments


def order_tiles(problem: Problem, config: TileConfig, tiles: int) -> TileConfig:
    """Return `config` with heads side by side where it leaves the order open and `problem` gains by that.

    It does where the tiles of one head do not fill the GPU, and the tiles of all heads do not fill it many times. Head
    after head, the heaviest tile of the last head would begin late and end alone. Elsewhere that costs less than
    reading rows of all heads, which do not stay in the L2 cache. All ring steps but one have equal tiles.
    """
    few = tiles < MULTIPROCESSORS and tiles * problem.window < FEW_PROGRAMS
    call = problem.call
    unequal = call.causal and not call.has_range and problem.kv_layout != KVLayout.PEER
    return replace(config, tiles_together=config.tiles_together or int(few and unequal))


def count_heads_together(problem: Problem, config: TileConfig, tiles: int) -> int:
    """Return how many KV heads a program takes: as many as `config` says, divide the window and leave enough programs.

    The copy engine takes the heads for columns of one row, so they have to follow each other there.
    """
    strides = problem.k_strides[1], problem.v_strides[1], block_d(problem.head_dim)
    heads = math.gcd(config.heads_together, problem.window) if {*strides} == {problem.head_dim} else 1
    # Halved, not lowered by one, so that it still divides the window.
    while heads > 1 and tiles * problem.window < heads * MANY_PROGRAMS:
        heads //= 2
    return heads


def make_grid(config: TileConfig, tiles: int, heads: int) -> tuple[int, int, int]:
    """Return the programs for all `tiles` of so many heads, or groups of heads: see `segments.lookup`."""
    # Rounded up to whole groups of tiles: programs of the last group may have no tile, and return.
    together = config.tiles_together or 1
    return -(-tiles // together) * together * heads, 1, 1
