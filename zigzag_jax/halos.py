"""The choice of method and halo for a prepared batch, from the values that the host knows."""

from typing import Any

import jax
import numpy as np

from zigzag_kernels import halo
from zigzag_kernels.batch_checks import check_halo
from zigzag_kernels.checks import (
    check_attention_chunk,
    check_lengths,
    check_offsets,
    check_real_lengths_array,
    check_window_size,
)
from zigzag_kernels.halo import HostSizes

HostValues = tuple[list[int], list[int] | None]
"""(offsets, real lengths); the lengths are None if all tokens are real."""


def reach_options(window_size, attention_chunk: int, max_seqlen: int | None) -> dict[str, Any]:
    """Return the arguments as checked keyword arguments of `prepare_batch`, in types that a cache can have as key.

    Raises `ValueError` for numbers out of range. A caller's own list or array has no hash, and True equals 1.
    """
    return {
        "window_size": check_window_size(window_size),
        "attention_chunk": check_attention_chunk(attention_chunk),
        "max_seqlen": halo.check_max_seqlen(max_seqlen) or None,
    }


def halo_of_batch(
    method: str | None, reach: tuple, documents: tuple, packed: tuple[int, int], world_size: int
) -> tuple[str, int, int]:
    """Return (method, rows of a halo, promised longest real length of a document) of a prepared batch.

    `reach` is (window_size, attention_chunk, max_seqlen). `documents` is (cu_seqlens, lengths) as the caller passed
    them. `packed` is (row_length, rows), with a row_length of 0 in the document layout. A `method` of None is chosen
    here. Raises `ValueError` for limits out of range, and if the host knows that a chunk is shorter than the halo.
    """
    window_size, attention_chunk, max_seqlen = reach
    on_host = None
    rows_seen = halo.reach_of_mask(True, window_size, attention_chunk, halo.check_max_seqlen(max_seqlen))
    if rows_seen is not None:  # nothing else depends on the documents
        on_host = _values(*documents)
    if method is None:
        method = halo.choose_method(rows_seen, _sizes(on_host, packed, world_size), world_size).value
    rows, promised = halo.halo_of_batch(method, window_size, attention_chunk, max_seqlen, world_size)
    halo.check_halo_in_chunk(rows, packed[0], world_size)
    if rows and on_host is not None:
        check_halo(*on_host, world_size, packed[0] or None, (rows, promised))
    return method, rows, promised


def check_documents(cu_seqlens, world_size: int, row_length: int | None, rows: int) -> None:
    """Raise `ValueError` if offsets are on the host and a chunk is shorter than a halo of `rows` rows.

    `row_length` is the number of tokens of a packed row in the row layout, otherwise None.
    """
    on_host = _values(cu_seqlens, None)
    if on_host is not None:
        check_halo(*on_host, world_size, row_length, (rows, 0))


def _values(cu_seqlens, lengths) -> HostValues | None:
    """Return (offsets, real lengths) if they are on the host; None for JAX arrays, which are not read."""
    if isinstance(cu_seqlens, jax.Array) or isinstance(lengths, jax.Array):
        return None
    offsets = check_offsets(np.asarray(cu_seqlens).tolist())
    check_lengths(offsets, 1)
    if lengths is None:
        return offsets, None
    real = np.asarray(lengths).tolist()
    check_real_lengths_array((len(real),), "int32", len(offsets) - 1)
    return offsets, real


def _sizes(on_host: HostValues | None, packed: tuple[int, int], world_size: int) -> HostSizes | None:
    """Return the sizes of a batch, None if only the device knows them."""
    if packed[0]:
        return halo.sizes_of_rows(*packed, world_size)
    return None if on_host is None else halo.sizes_of_documents(*on_host, world_size)
