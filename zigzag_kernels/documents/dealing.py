"""`deal_documents`: the places of the documents of a training step, in shapes that as few sizes as possible have."""

import functools
from collections.abc import Sequence
from typing import Any

from ..checks import MAX_ROWS, check_int, check_layout, check_world_size
from ..modes import Layout
from .packed import PackedBatch, check_entries, pack_documents
from .plan import DocumentPlan
from .planner import plan_documents

SHARES = 8
"""Sizes, besides none, that the part of split documents may have where a caller leaves them open: eighths of T."""


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
    """Return the plan of documents of these `lengths`, or in the row layout their places in one packed row.

    Args:
        lengths, world_size, tokens, split_above, mask: as in `plan_documents`.
        max_documents: the most documents of a batch; None is as many as this batch has.
        max_whole: entries for whole documents of a rank. None is twice its share of `max_documents`, or if that is None
            as many as this batch needs. Kernels take the rows for each entry as the mean length.
        max_split: entries for split documents. None is `max_documents`.
        layout: "document" or "row", which takes neither `max_whole`, `max_split`, `split_above` nor `split_tokens`.
        split_tokens: as in `plan_documents`. None is as few as this batch needs if `tokens` is None; otherwise the
            fewest eighths of `tokens` with which a plan is found, so that few shapes serve all steps. With
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
                pass  # too few rows are left for whole documents
    return exact


def _plan(lengths, world_size: int, options: dict, tokens: int | None, split_tokens: int | None) -> DocumentPlan:
    """Return `plan_documents` of these arguments, with its errors in the words of `deal_documents`."""
    try:
        return plan_documents(lengths, world_size, tokens=tokens, split_tokens=split_tokens, **options)
    except ValueError as error:
        raise ValueError(str(error).replace("max_documents", "max_whole")) from None
