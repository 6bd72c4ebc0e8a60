"""`plan_documents`: which documents of a batch are split over all ranks, and which rank holds each of the others."""

from collections.abc import Sequence

from ..batch_checks import check_document_lengths
from ..checks import (
    MAX_ROWS,
    check_attention_chunk,
    check_flag,
    check_int,
    check_window_size,
    check_world_size,
)
from ..cost.counts import Mask
from ..layout import MAX_OFFSET
from .placing import Document, Placement
from .plan import DocumentPlan
from .splitting import Batch

MOVED_ROW = 1 / 8
"""Cost of one row whose K/V move between ranks, in rows of padding, which every layer computes."""
# Numbers of rows to try where the caller leaves `tokens` open, as multiples of the mean number of real rows of a rank.
ROOM = 1.0, 1.005, 1.01, 1.02, 1.04, 1.08, 1.16, 1.32, 1.64, 2.3


def plan_documents(
    lengths: Sequence[int],
    world_size: int,
    *,
    tokens: int | None = None,
    split_above: int | None = None,
    split_tokens: int | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    causal: bool = True,
    max_documents: int | None = None,
    max_split: int | None = None,
) -> DocumentPlan:
    """Distribute documents over ranks: most stay whole, and long ones are split, so that ranks have equal work.

    Args:
        lengths: tokens of each document of the batch, on the host.
        world_size: W, the number of ranks.
        tokens: rows of each rank, with padding. None: as few as possible, or a few more if fewer K/V rows then move.
        split_above: split the documents longer than this, and others only if the batch does not fit otherwise. None:
            split as few tokens as make the work of all ranks about equal.
        split_tokens: rows of each rank for chunks of split documents, with padding. None: as few as they need.
        window_size, attention_chunk, causal: the mask for which work is predicted, as in `zigzag_attention`.
        max_documents: the most whole documents that a rank may have. None: as many as the plan has.
        max_split: the most split documents. None: as many as the plan has.

    Plans with equal `tokens`, `split_tokens`, `max_documents` and `max_split` have arrays of equal shapes, so that one
    compiled step works for all of them. The same arguments give the same plan on every rank. Raises `ValueError` for a
    batch that does not fit; the error says how many tokens are too many.
    """
    world_size = check_world_size(world_size)
    lengths = check_document_lengths("lengths", lengths)
    mask = Mask(check_flag("causal", causal), check_window_size(window_size), check_attention_chunk(attention_chunk))
    if split_above is not None:
        split_above = check_int("split_above", split_above, 0, MAX_OFFSET, "a number of tokens")
    fixed = {"tokens": tokens, "split_tokens": split_tokens, "max_documents": max_documents, "max_split": max_split}
    for name, value in fixed.items():
        if value is not None:
            fixed[name] = check_int(name, value, 0, MAX_ROWS, f"an int from 0 to {MAX_ROWS}")
    tokens, split_tokens, max_documents, max_split = fixed.values()
    if tokens is not None and (split_tokens or 0) > tokens:
        raise ValueError(f"split_tokens: expected at most tokens = {tokens}, got {split_tokens}")
    batch = Batch(lengths, world_size, mask, split_above, split_tokens, max_documents, max_split)
    real = sum(lengths)
    if tokens is not None:
        found = batch.search(tokens) if real <= world_size * tokens else None
        if found is None:
            raise ValueError(batch.too_many(real, tokens))
    else:
        least = max(-(-real // world_size), split_tokens or 0)
        trials = [round(share * least) for share in ROOM] + [batch.enough_rows]
        tokens, found = _fewest_rows(batch, trials)
        if found is None:
            raise ValueError(batch.too_many(real, None))
    split, placement = found
    whole = tuple(tuple(sorted(x.number for x in documents)) for documents in placement.documents)
    return DocumentPlan(
        lengths=lengths,
        world_size=world_size,
        tokens=tokens,
        split_tokens=batch.split_rows(split) if split_tokens is None else split_tokens,
        whole=whole,
        split=tuple(sorted(document.number for document in split)),
        max_documents=max(map(len, whole)) if max_documents is None else max_documents,
        max_split=len(split) if max_split is None else max_split,
        mask=mask,
    )


def _fewest_rows(batch: Batch, trials: list[int]) -> tuple[int, tuple[list[Document], Placement] | None]:
    """Return (rows of a rank, result of `Batch.search`) with the lowest cost, of the ascending numbers `trials`."""
    least, chosen = float("inf"), (trials[0], None)
    for rows in trials:
        if rows >= least:
            break
        found = batch.search(rows, hard=rows == trials[-1])
        cost = rows + MOVED_ROW * batch.split_rows(found[0]) if found else least
        if cost < least:
            least, chosen = cost, (rows, found)
    return chosen
