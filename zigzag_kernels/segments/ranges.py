"""The rule of ranged masks: which keys a row of a document sees, and which rows see a key.

A mask is *ranged* if it has a window or chunks, if documents end with padding, or if packed rows are cut into chunks.
Both ends of a range grow with the position, so the ranges of a tile's first and last row bound the ranges of all its
rows. Portable kernels (Triton) and Hopper kernels (Gluon) both call these functions, so they use only features of both.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .lookup import key_index, key_position


@dataclass(frozen=True)
class Mask:
    """The constants of a mask, for kernels whose own struct of constants lacks these fields."""

    CAUSAL: Any
    LEFT: Any  # positions before a row that it sees, -1 for all
    RIGHT: Any  # positions after a row that it sees, -1 for all
    CHUNK: Any  # tokens of a chunk of attention, 0 for none


@triton.constexpr_function
def make_mask(CAUSAL, LEFT, RIGHT, CHUNK):
    """Return the `Mask` of these constants."""
    return Mask(CAUSAL, LEFT, RIGHT, CHUNK)


class KeyRange(NamedTuple):
    """The keys that each row of a tile sees: `[begin, end)`, or `[0, end)` unless the mask is ranged."""

    begin: tl.tensor  # [BLOCK_M], or a scalar for one row
    end: tl.tensor


class RowRange(NamedTuple):
    """The rows, at positions `[begin, end)`, that see some key of a tile of keys.

    Every row from `whole_begin` to before `whole_end` sees all keys of the tile.
    """

    begin: tl.tensor
    whole_begin: tl.tensor
    whole_end: tl.tensor
    end: tl.tensor


@triton.jit
def positions_seen(positions, real, MASK: tl.constexpr):
    """Return the `KeyRange`, in positions, of rows at `positions` of a document with `real` real tokens.

    Rows behind the real tokens are padding, and see no key.
    """
    CHUNK: tl.constexpr = MASK.CHUNK
    begin = positions * 0
    if MASK.LEFT >= 0:
        begin = tl.maximum(positions - MASK.LEFT, 0)
    if MASK.CAUSAL:
        end = positions + 1
    elif MASK.RIGHT >= 0:
        end = positions + MASK.RIGHT + 1
    else:
        end = positions * 0 + real
    if CHUNK > 0:
        chunk = positions // CHUNK * CHUNK
        begin = tl.maximum(begin, chunk)
        end = tl.minimum(end, chunk + CHUNK)
    end = tl.minimum(end, real)
    is_real = positions < real
    return KeyRange(begin=tl.where(is_real, begin, 0), end=tl.where(is_real, end, 0))


@triton.jit
def keys_of_positions(positions, document, MASK: tl.constexpr):
    """Return the `KeyRange`, in key numbers of the K/V buffer, of rows at `positions` of a `Document`."""
    seen = positions_seen(positions, document.real, MASK)
    return KeyRange(begin=key_index(document, seen.begin), end=key_index(document, seen.end))


@triton.jit
def seeing_positions(first_key, end_key, document, MASK: tl.constexpr):
    """Return the `RowRange` of the rows of a `Document` that see any of the keys `[first_key, end_key)`.

    No row sees padding keys. If the tile has padding keys, there is no row that sees all keys of the tile.
    """
    CHUNK: tl.constexpr = MASK.CHUNK
    real = document.real
    # No row sees padding keys, so only the real keys of the tile count.
    last_key = tl.minimum(end_key, key_index(document, real)) - 1
    first, last = key_position(document, first_key), key_position(document, last_key)
    begin, whole_begin = first * 0, first * 0
    end, whole_end = first * 0 + real, first * 0 + real
    if MASK.CAUSAL:
        begin, whole_begin = first, last
    elif MASK.RIGHT >= 0:
        begin, whole_begin = first - MASK.RIGHT, last - MASK.RIGHT
    if MASK.LEFT >= 0:
        end, whole_end = tl.minimum(end, last + MASK.LEFT + 1), tl.minimum(end, first + MASK.LEFT + 1)
    if CHUNK > 0:
        # A row sees only keys of its own chunk. Rows from the chunk of the first key to the chunk of the last key see
        # some key. Rows see all keys only if both keys lie in their chunk.
        begin = tl.maximum(begin, first // CHUNK * CHUNK)
        whole_begin = tl.maximum(whole_begin, last // CHUNK * CHUNK)
        end = tl.minimum(end, (last // CHUNK + 1) * CHUNK)
        whole_end = tl.minimum(whole_end, (first // CHUNK + 1) * CHUNK)
    # If all keys are padding, no row sees any. If some keys are padding, no row sees all.
    end = tl.where(first_key <= last_key, end, begin)
    whole_end = tl.where(last_key == end_key - 1, whole_end, whole_begin)
    return RowRange(begin=begin, whole_begin=whole_begin, whole_end=whole_end, end=end)
