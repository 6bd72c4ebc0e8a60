"""`validate`, which reads the values of a batch on the host and names what is wrong with them."""

import numpy as np

from zigzag_kernels.batch_checks import check_halo, check_parts, check_whole_batch
from zigzag_kernels.checks import (
    check_int,
    check_layout,
    check_real_lengths,
    check_real_lengths_array,
    check_world_size,
)
from zigzag_kernels.documents import DocumentPlan, check_no_options, check_plan
from zigzag_kernels.halo import check_max_seqlen
from zigzag_kernels.modes import Layout

from .arguments import Array, check_array, on_host
from .host import ShardedBatch
from .plans import Parts, offsets_of


def validate(
    cu_seqlens: Array | DocumentPlan | ShardedBatch,
    world_size: int,
    total: int | None = None,
    *,
    layout: str = "document",
    row_length: int | None = None,
    lengths: Array | None = None,
    halo: int = 0,
    max_seqlen: int | None = None,
) -> None:
    """Raise `ValueError` unless the documents can be dealt out to `world_size` ranks.

    Attention cannot look at values on a device and returns NaN for invalid ones; this names the fault. It reads arrays
    on the host, which waits for the device, so call it once.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch; `ValueError` if traced. A plan of documents or a
            `host.ShardedBatch` says `total`, `row_length` and `lengths` itself.
        world_size: number of ranks.
        total: rows of the whole batch, if the documents are to be checked against them.
        layout: "document" or "row", which needs `total` or `row_length`.
        row_length: tokens of a packed row over all ranks, in the row layout; None is one row of all tokens.
        lengths: `[N]`, the real lengths of padded documents; `ValueError` if traced.
        halo, max_seqlen: for method "halo", the `halo` of the prepared batch, rows before a chunk that its rows may
            see, and the most real tokens of a document, as promised.
    """
    layout, world_size = check_layout(layout), check_world_size(world_size)
    limits = check_int("halo", halo, 0), check_max_seqlen(max_seqlen)
    options = {"layout": layout, "row_length": row_length, "lengths": lengths, "total": total}
    if isinstance(cu_seqlens, DocumentPlan):
        plan = check_plan(cu_seqlens, world_size, **options)
        check_halo(plan.split_cu_seqlens, plan.split_lengths, world_size, None, limits)
        return
    if isinstance(cu_seqlens, ShardedBatch):
        check_no_options(layout=Layout.DOCUMENT, row_length=row_length, lengths=lengths, total=total)
        given, row_length = offsets_of(cu_seqlens, world_size, layout)
        total, lengths = world_size * cu_seqlens.tokens, cu_seqlens.lengths
        row_length = row_length or None  # 0 in a batch without tokens
    else:
        given = cu_seqlens
    if isinstance(given, Parts):
        _check_parts_of_all(given, world_size, limits)
        return
    offsets = on_host(given)
    check_whole_batch(offsets, world_size, total, layout, row_length)
    real = None if lengths is None else _real_lengths(lengths, offsets)
    check_halo(offsets, real, world_size, (row_length or total) if layout is Layout.ROW else None, limits)


def _real_lengths(lengths: Array, cu_seqlens: list[int]) -> list[int]:
    """Return the real `lengths [N]` of the sequences of `cu_seqlens`; `ValueError` unless they fit."""
    if not isinstance(lengths, list | tuple):
        check_array("lengths", lengths)
        check_real_lengths_array(lengths.shape, str(lengths.dtype), len(cu_seqlens) - 1)
    real = on_host(lengths, name="lengths") if len(lengths) else []
    check_real_lengths_array((len(real),), "int32", len(cu_seqlens) - 1)
    check_real_lengths(real, cu_seqlens)
    return real


def _check_parts_of_all(parts: Parts, world_size: int, limits: tuple[int, int]) -> None:
    """Raise `ValueError` unless the whole and split documents of all ranks fit into their rows."""
    whole = np.array(on_host(parts.whole_cu_seqlens, name="whole_cu_seqlens")).reshape(world_size, -1)
    offsets = on_host(parts.split_cu_seqlens)
    real = _real_lengths(parts.split_lengths, offsets)
    for of_rank in whole.tolist():
        check_parts(of_rank, offsets, real, world_size, parts.whole_tokens, parts.tokens)
    check_halo(offsets, real, world_size, None, limits)
