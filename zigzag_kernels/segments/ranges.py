"""The rule of ranged masks: which keys a row of a document sees, and which rows see a key.

A mask is *ranged* if it has a window or chunks, if documents end with padding, or if packed rows are cut into chunks.
Both ends of a range grow with the position, so the ranges of a tile's first and last row bound the ranges of all its
rows. Portable kernels and Hopper kernels both call these functions, which use only features that Gluon has too.
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
    LEFT: Any  # tokens that a row sees on each side, -1 for all
    RIGHT: Any
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
    """Rows at positions `[begin, end)`; each row from `whole_begin` to `whole_end` sees every key of a tile."""

    begin: tl.tensor
    whole_begin: tl.tensor
    whole_end: tl.tensor
    end: tl.tensor


@triton.jit
def positions_seen(positions, real, MASK: tl.constexpr):
    """Return the `KeyRange`, in positions, of rows at `positions`; from `real` on the document is padding.

    Padding rows see no key.
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

    No row sees padding keys, so a tile with padding keys is whole for no row.
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
        # Rows see keys of their own chunk alone: rows from the chunk of the first key to the chunk of the last one see
        # some key, and only rows in the chunk of both see all.
        begin = tl.maximum(begin, first // CHUNK * CHUNK)
        whole_begin = tl.maximum(whole_begin, last // CHUNK * CHUNK)
        end = tl.minimum(end, (last // CHUNK + 1) * CHUNK)
        whole_end = tl.minimum(whole_end, (first // CHUNK + 1) * CHUNK)
    # A tile of padding keys alone has no rows; a tile with some padding keys has no whole rows.
    end = tl.where(first_key <= last_key, end, begin)
    whole_end = tl.where(last_key == end_key - 1, whole_end, whole_begin)
    return RowRange(begin=begin, whole_begin=whole_begin, whole_end=whole_end, end=end)
