"""`deal_documents`: distributes the documents of a training step over ranks, in as few different shapes as possible."""

import functools
from collections.abc import Sequence
from typing import Any

from ..checks import MAX_ROWS, check_int, check_layout, check_world_size
from ..modes import Layout
from .packed import PackedBatch, check_entries, pack_documents
from .plan import DocumentPlan
from .planner import plan_documents

SHARES = 8
"""The part of split documents has a multiple of T / 8 rows if the caller leaves its size open."""


def deal_documents(
    lengths: Sequence[int],
    world_size: int,
    *,
    tokens: int | None = None,
    max_documents: int | None = None,
    max_whole: int | None = None,
    max_split: int | None = None,
    layout: str = "document",
    split_above: int | None = None,
    split_tokens: int | None = None,
    **mask,
) -> PackedBatch | DocumentPlan:
    """Return the plan of documents of these `lengths`; in the row layout, their places in one packed row.

    Args:
        lengths, world_size, tokens, split_above, mask: as in `plan_documents`.
        max_documents: the most documents that a batch may have. None: the number of documents of this batch.
        max_whole: the most whole documents that a rank may have. None: twice a rank's share of `max_documents`, or as
            many as this batch needs if that is None too. Do not choose a much larger number: kernels choose their tiles
            by the mean length, rows divided by this number.
        max_split: the most split documents. None: `max_documents`.
        layout: "document" or "row". The row layout accepts none of `max_whole`, `max_split`, `split_above` and
            `split_tokens`.
        split_tokens: as in `plan_documents`. None: as few rows as this batch needs if `tokens` is None. Otherwise the
            fewest eighths of `tokens` for which a plan exists, so that batches have few different shapes. With
            `split_above=0` it is all of `tokens`.

    Raises `ValueError` for documents that do not fit.
    """
    world_size = check_world_size(world_size)
    if check_layout(layout) is Layout.ROW:
        of_plans = {"split_above": split_above, "split_tokens": split_tokens}
        for name, given in (of_plans | {"max_whole": max_whole, "max_split": max_split}).items():
            if given is not None:
                raise ValueError(f"{name}: expected None with layout 'row', got {given!r}")
        return pack_documents(lengths, world_size, tokens=tokens, max_documents=max_documents, layout=layout)
    if max_documents is not None:
        max_documents = check_entries(max_documents, len(lengths))
        max_split = max_documents if max_split is None else max_split
        max_whole = min(max_documents, 2 * -(-max_documents // world_size)) if max_whole is None else max_whole
    options: dict[str, Any] = mask | {"max_documents": max_whole, "max_split": max_split, "split_above": split_above}
    plan = functools.partial(_plan, lengths, world_size, options)
    if tokens is None or split_tokens is not None:
        return plan(tokens, split_tokens)
    tokens = check_int("tokens", tokens, 0, MAX_ROWS, f"an int from 0 to {MAX_ROWS}")
    if world_size > 1 and split_above == 0:
        return plan(tokens, tokens)
    exact = plan(tokens, None)
    for share in range(SHARES + 1):
        rows = -(-share * tokens // SHARES)
        if rows == exact.split_tokens:
            break
        if rows > exact.split_tokens:
            try:
                return plan(tokens, rows)
            except ValueError:
                pass  # with so many rows for split documents, whole documents do not fit: try one eighth more
    return exact


def _plan(lengths, world_size: int, options: dict, tokens: int | None, split_tokens: int | None) -> DocumentPlan:
    """Return `plan_documents` of these arguments; its errors name the arguments of `deal_documents`."""
    try:
        return plan_documents(lengths, world_size, tokens=tokens, split_tokens=split_tokens, **options)
    except ValueError as error:
        raise ValueError(str(error).replace("max_documents", "max_whole")) from None
