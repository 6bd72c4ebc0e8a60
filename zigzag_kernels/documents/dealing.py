"""`deal_documents`: the places of the documents of a training step, in shapes that as few sizes as possible have."""

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
    max_split: int | None = None,
    layout: str = "document",
    split_above: int | None = None,
    split_tokens: int | None = None,
    **mask,
) -> PackedBatch | DocumentPlan:
    """Return the plan of documents of these `lengths`, or in the row layout their places in one packed row.

    Args:
        lengths, world_size, tokens, split_above, mask: as in `plan_documents`.
        max_documents: entries for whole documents of a rank, and `max_split`, None being as many, those for split ones.
            No batch may have more documents. None is as many as this batch needs.
        layout: "document" or "row", which takes neither `split_above`, `split_tokens` nor `max_split`.
        split_tokens: as in `plan_documents`. None is as few as this batch needs if `tokens` is None; otherwise the
            fewest eighths of `tokens` with which a plan is found, so that few shapes serve all steps. With
            `split_above=0` it is all of `tokens`.

    Raises `ValueError` for documents that do not fit.
    """
    world_size = check_world_size(world_size)
    if check_layout(layout) is Layout.ROW:
        for name, given in (("split_above", split_above), ("split_tokens", split_tokens), ("max_split", max_split)):
            if given is not None:
                raise ValueError(f"{name}: expected None with layout 'row', got {given!r}")
        return pack_documents(lengths, world_size, tokens=tokens, max_documents=max_documents, layout=layout)
    if max_documents is not None:
        max_documents = check_entries(max_documents, len(lengths))
    sizes = {"max_documents": max_documents, "max_split": max_documents if max_split is None else max_split}
    options: dict[str, Any] = sizes | mask | {"split_above": split_above}
    if tokens is None or split_tokens is not None:
        return plan_documents(lengths, world_size, tokens=tokens, split_tokens=split_tokens, **options)
    tokens = check_int("tokens", tokens, 0, MAX_ROWS, f"an int from 0 to {MAX_ROWS}")
    if world_size > 1 and split_above == 0:
        return plan_documents(lengths, world_size, tokens=tokens, split_tokens=tokens, **options)
    plan = plan_documents(lengths, world_size, tokens=tokens, **options)
    for share in range(SHARES + 1):
        rows = -(-share * tokens // SHARES)
        if rows == plan.split_tokens:
            return plan
        if rows > plan.split_tokens:
            try:
                return plan_documents(lengths, world_size, tokens=tokens, split_tokens=rows, **options)
            except ValueError:
                pass  # too few rows are left for whole documents
    return plan
