"""`validate`, which reads the values of a batch on the host and names what is wrong with them."""

import functools

import torch

from zigzag_kernels.batch_checks import check_halo, check_whole_batch
from zigzag_kernels.checks import check_int, check_layout, check_real_lengths, check_world_size
from zigzag_kernels.documents import DocumentPlan, check_no_options, check_plan
from zigzag_kernels.halo import check_max_seqlen
from zigzag_kernels.modes import Layout

from .arguments import as_cu_seqlens, as_lengths, check_tensor
from .parallel.agreement import compare, place_in, refuse, resolve
from .parallel.collectives import fingerprint
from .plans import Parts


def validate(
    cu_seqlens: torch.Tensor | DocumentPlan | Parts,
    world_size: int,
    total: int | None = None,
    *,
    layout: str = "document",
    row_length: int | None = None,
    lengths: torch.Tensor | None = None,
    group=None,
    unsharded: torch.Tensor | None = None,
    halo: int = 0,
    max_seqlen: int | None = None,
) -> None:
    """Raise `ValueError` unless the documents of `cu_seqlens` can be distributed over `world_size` ranks.

    Attention itself only returns NaN for invalid values, because checking them would synchronise with the GPU. This
    function reads the values on the host, so call it once, not in every step.

    `total` is the number of rows of the unsharded batch. The row layout needs `total`, or `row_length`, the tokens of a
    packed row. `lengths` are the real lengths of padded documents. For method "halo", pass the `halo` of the prepared
    batch, its number of rows, and the promised `max_seqlen`. A plan of documents, and the `Parts` of a rank in one, say
    `total`, `layout`, `row_length` and `lengths` themselves.

    With a `group`, as in `zigzag_attention`, every rank of it makes this call. Ranks compare all arguments, and
    `unsharded`, the whole batch before `shard`. If ranks differ, or one of them finds a fault, all raise the same
    error.
    """
    limits = check_int("halo", halo, 0), check_max_seqlen(max_seqlen)
    check = functools.partial(_check_values, cu_seqlens, world_size, total, layout, row_length, lengths, limits)
    if group is None:
        check()
        if unsharded is not None:
            check_tensor("unsharded", unsharded)
        return
    place = place_in(group)
    assert place.group_name is not None
    group = resolve(place.group_name)
    try:
        if world_size != place.world_size:
            raise ValueError(f"world_size: expected the size of the group, {place.world_size}, got {world_size}")
        offsets, real = check()
        if unsharded is not None:
            check_tensor("unsharded", unsharded)
    except ValueError as error:
        refuse(group, error)
    report = {"call": "validate", "total": total, "layout": str(layout), "row_length": row_length}
    if isinstance(cu_seqlens, DocumentPlan):
        report["plan"] = f"{cu_seqlens.tokens} rows, whole documents {cu_seqlens.whole}"
    elif isinstance(cu_seqlens, Parts):
        report["parts"] = f"{cu_seqlens.tokens} rows, {cu_seqlens.whole_tokens} of them for whole documents"
    report |= {"sequences": len(offsets) - 1, "lengths": None if real is None else len(real)}
    if unsharded is not None:
        report["unsharded"] = f"fingerprint {int(fingerprint(unsharded)):#x}"
    report |= {f"cu_seqlens[{index}]": value for index, value in enumerate(offsets)}
    compare(group, report | {f"lengths[{index}]": value for index, value in enumerate(real or ())})


def _check_values(
    cu_seqlens: torch.Tensor | DocumentPlan | Parts,
    world_size: int,
    total: int | None,
    layout: str,
    row_length: int | None,
    lengths: torch.Tensor | None,
    limits: tuple[int, int],
) -> tuple[list[int], list[int] | None]:
    """Return the values of `cu_seqlens` and of `lengths`; `ValueError` if they cannot be dealt out."""
    layout, world_size = check_layout(layout), check_world_size(world_size)
    options = {"layout": layout, "row_length": row_length, "lengths": lengths, "total": total}
    if isinstance(cu_seqlens, DocumentPlan):
        plan = check_plan(cu_seqlens, world_size, **options)
        check_halo(plan.split_cu_seqlens, plan.split_lengths, world_size, None, limits)
        return plan.split_cu_seqlens, plan.split_lengths
    if isinstance(cu_seqlens, Parts):
        check_no_options(**options)
        return cu_seqlens.checked().values(world_size, limits)
    offsets = as_cu_seqlens(cu_seqlens, world_size if layout is Layout.DOCUMENT else 1).tolist()
    check_whole_batch(offsets, world_size, total, layout, row_length)
    real = None
    if lengths is not None:
        device = lengths.device if isinstance(lengths, torch.Tensor) else torch.device("cpu")
        real = as_lengths(lengths, offsets, device).tolist()
        check_real_lengths(real, offsets)
    check_halo(offsets, real, world_size, (row_length or total) if layout is Layout.ROW else None, limits)
    return offsets, real
