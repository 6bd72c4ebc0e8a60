"""The tiles of a launch and the programs that take them: their number, their order, and the heads of each."""

import math
from dataclasses import replace

from ..heuristics import FEW_PROGRAMS, MANY_PROGRAMS, MULTIPROCESSORS, SEQUENCE_KEYS
from ..modes import KVLayout, Operation
from ..problem import Problem
from ..tiles.config import TileConfig, block_d


def count_tiles(problem: Problem, operation: Operation, config: TileConfig) -> int:
    """Return an upper bound of the tiles of one KV head, from static shapes only: see `segments.lookup.locate`."""
    segments, sequences = problem.table_entries
    if operation.owns_keys:
        return problem.kv_tokens // config.BLOCK_N + sequences
    return problem.most_query_rows * problem.group // config.BLOCK_M + segments


def order_tiles(problem: Problem, operation: Operation, config: TileConfig, tiles: int) -> TileConfig:
    """Return `config` with a final order of tiles: head after head, or the heads side by side.

    An order that `config` already has is kept. Heads run side by side if the tiles of one head do not fill the GPU, and
    the tiles of all heads do not fill it many times. If such heads ran one after another, the heaviest tile of the last
    head would begin late and run alone at the end. In all other launches, head after head is faster: K/V of one head
    stay in the L2 cache, and K/V of all heads do not. Tiles of equal weight gain nothing from running side by side: all
    ring steps but one have such tiles.

    Tiles of keys of several long sequences on one device run side by side even if the tiles of one head fill the GPU.
    Each sequence has heavy tiles, and the heavy tiles of a head's last sequence would begin late.
    """
    busy = _count_busy_tiles(problem, operation, config, tiles)
    several = operation is Operation.DKDV and _has_several_long_sequences(problem)
    few = (busy < MULTIPROCESSORS or several) and busy * problem.window < FEW_PROGRAMS
    call = problem.call
    unequal = call.causal and not call.has_range and problem.kv_layout != KVLayout.PEER
    return replace(config, tiles_together=config.tiles_together or int(few and unequal))


def _count_busy_tiles(problem: Problem, operation: Operation, config: TileConfig, tiles: int) -> int:
    """Return about how many of the `tiles` of one KV head have work.

    In the row layout a rank holds rows of few documents, and the keys of all other documents are seen by none of its
    rows. If the average document is no longer than the rows of a rank, about as many keys are seen as the rank has
    rows. The host knows neither the rank nor the lengths, so this number decides on speed only.
    """
    packed = problem.row_layout and problem.kv_layout == KVLayout.GATHERED
    if operation is Operation.DKDV and packed and problem.sequences >= problem.world_size:
        _, sequences = problem.table_entries
        return min(tiles, problem.rows // config.BLOCK_N + sequences)
    return tiles


def _has_several_long_sequences(problem: Problem) -> bool:
    whole = problem.world_size == 1 and problem.kv_layout == KVLayout.GATHERED
    return whole and problem.sequences > 1 and problem.kv_tokens >= SEQUENCE_KEYS * problem.sequences


def count_heads_together(problem: Problem, config: TileConfig, tiles: int) -> int:
    """Return how many KV heads one program computes, one after the other.

    It is at most `config.heads_together`, divides the window, and leaves enough programs to fill the GPU. The copy
    engine reads several heads as columns of one row, so the heads of a token must be adjacent in memory.
    """
    strides = problem.k_strides[1], problem.v_strides[1], block_d(problem.head_dim)
    heads = math.gcd(config.heads_together, problem.window) if {*strides} == {problem.head_dim} else 1
    # Half of a divisor of the window still divides the window; one less might not.
    while heads > 1 and tiles * problem.window < heads * MANY_PROGRAMS:
        heads //= 2
    return heads


def make_grid(config: TileConfig, tiles: int, heads: int) -> tuple[int, int, int]:
    """Return the grid of programs for `tiles` of each of `heads` heads, or groups of heads: see `tile_and_head`."""
    # The tiles are rounded up to whole groups of tiles; programs of the last group may have no tile, and return.
    together = config.tiles_together or 1
    return -(-tiles // together) * together * heads, 1, 1
