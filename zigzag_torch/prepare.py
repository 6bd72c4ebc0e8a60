"""`prepare_batch`, which checks the documents of a training step and builds the tables that all layers share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.utils import _pytree as pytree

from zigzag_kernels.batch_checks import check_form
from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import check_layout, check_method, check_world_size
from zigzag_kernels.documents import DocumentPlan, check_plan
from zigzag_kernels.halo import HostSizes
from zigzag_kernels.modes import Backend, Layout

from . import launch
from .arguments import as_lengths, as_rank, check_batch, check_device, check_tensor, is_padded, mark_padded
from .batch import Batch, Form, check_host_rows, tables_of
from .halos import halo_of_batch
from .parallel.agreement import Place, place_in, refuse_together
from .parallel.collectives import common_rank
from .plans import Parts, with_identity

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _usable_in_training(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap `function` to make ordinary tensors inside `torch.inference_mode` too, from copies of its arguments."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            args, kwargs = pytree.tree_map(_copied, (args, kwargs))
            return function(*args, **kwargs)

    return wrapped


@_usable_in_training
def prepare_batch(
    cu_seqlens: torch.Tensor | DocumentPlan | Parts,
    rank: int | torch.Tensor | None = None,
    world_size: int | None = None,
    *,
    method: str | None = None,
    group=None,
    backend: str | None = None,
    unsharded: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    layout: str = "document",
    row_length: int | None = None,
    rows: int = 1,
    device: torch.device | str | int | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    max_seqlen: int | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and for both passes.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences over all ranks. Other integers are converted. A list,
            tuple or NumPy array is checked as in `validate`, and becomes a tensor on the CPU. Instead of offsets, pass
            a plan of `plan_documents`, or the `Parts` of this rank in a plan: each rank then has the rows of the plan,
            whole documents first. The tensors of a plan are on `device`, by default the CPU.
        rank, world_size: rank is an int, or a tensor of one integer on the device of `cu_seqlens`; world_size is an
            int. None means the rank and size in the `group`. Without a group, world_size is 1 by default, and rank is
            required if world_size is larger.
        method: as in the attention calls. None means "halo" if the host knows that halos suffice for `window_size`,
            `attention_chunk` or `max_seqlen`, and otherwise "allgather". The host knows it in the row layout, for a
            plan, and for offsets on the host.
        group: as in the attention calls. Every rank of it makes this call, and the ranks compare their `cu_seqlens` on
            the device. If they differ, attention returns NaN on all ranks, and `validate` gives the reason.
        backend: as in the attention calls.
        unsharded: the whole batch before `shard`, such as token ids, on the device of `cu_seqlens`. Ranks of a group
            compare it like `cu_seqlens`, because ranks with different data would attend to a mixture of both.
        lengths: `[N]` int32, the real tokens of each sequence. Its other rows, at its end, are padding, with out 0, lse
            -inf and zero gradients, and no row attends to them. A negative length, or one above the length of the
            sequence, gives NaN everywhere, or an error if both `lengths` and `cu_seqlens` are lists, tuples or NumPy
            arrays.
        layout: as in the attention calls, which must get the same layout.
        row_length, rows: required in the row layout with several ranks. `row_length` is the number of tokens of one
            packed row over all ranks, a multiple of `2 * world_size`; `rows` is the number of packed rows.
        window_size, attention_chunk: for methods None and "halo", the largest window of all layers that will use the
            batch. It decides how many rows a halo has, for layers with smaller windows too.
        max_seqlen: a promise that no document has more real tokens. With method "halo" it also limits the rows of a
            halo. If a batch breaks the promise, that method gives NaN everywhere, or an error if the host has the
            values.

    The batch keeps the tensors `cu_seqlens` and `lengths` themselves: do not write new values into them while it is in
    use. Raises the errors of `zigzag_attention`. The host does not wait for the device. A batch that is prepared in
    `torch.inference_mode` can also be used for training.
    """
    place = place_in(group)
    try:
        if method is not None:
            check_method(method)
        check_layout(layout)
        documents = _documents_of(cu_seqlens, lengths, layout, rank, world_size, place, device)
        cu_seqlens, rank, world_size = _placed(documents.cu_seqlens, rank, world_size, place, Layout(layout))
        form = Form(*check_form(layout, row_length, rows, world_size), tokens=documents.tokens)
        if documents.parts is not None:
            if place.group_name is None:
                raise ValueError("group: expected that of the ranks of a plan with whole and split documents, got None")
            form = form._replace(whole_tokens=documents.parts.whole_tokens)
        if form.row_length:
            check_host_rows(documents.cu_seqlens, form, world_size)
        reach, packed = (window_size, attention_chunk, max_seqlen), (form.row_length, form.rows)
        method, halo, promised = halo_of_batch(method, reach, documents.on_host, packed, world_size, documents.sizes)
        lengths = documents.lengths
        if lengths is not None:
            lengths = as_lengths(lengths, documents.cu_seqlens, cu_seqlens.device)
        backend = launch.choose_backend(backend, cu_seqlens.device)
        if unsharded is not None:
            check_tensor("unsharded", unsharded)
            check_device("unsharded", unsharded, "cu_seqlens", cu_seqlens)
    except (ValueError, RuntimeError) as error:
        refuse_together(place, error)
        raise
    own_rank = as_rank(rank, cu_seqlens.device)
    parts = documents.parts
    if place.group_name is not None:
        in_words = f"{form.in_words}, halo {halo}, documents of {promised}" if halo else form.in_words
        compared_lengths = lengths if lengths is None else with_identity(lengths, documents.plan)
        compared = place.group_name, "prepare_batch", compared_lengths, in_words, None if parts is None else parts.fault
        own_rank = common_rank(cu_seqlens, unsharded, own_rank, *compared)
    known: dict[str, Any] = {} if parts is None else {"whole_cu_seqlens": parts.whole_cu_seqlens}
    known |= {"compared_by": place.group_name, "host_rank": rank if isinstance(rank, int) else None}
    known |= {"halo": halo, "max_seqlen": promised, "padded": is_padded(documents.cu_seqlens)}
    if unsharded is not None and unsharded.ndim and not (form.row_length or form.tokens):
        known["unsharded_rows"] = unsharded.shape[0]  # other forms say how many rows a rank has
    batch = Batch(cu_seqlens, own_rank, world_size, method, **known, lengths=lengths, **form._asdict())
    if backend == Backend.REFERENCE:
        return batch
    return dataclasses.replace(batch, **tables_of(batch, backend)._asdict())


def _copied(x):
    if not isinstance(x, torch.Tensor):
        return x
    copy = x.clone()
    if is_padded(x):
        mark_padded(copy)
    return copy


class _Documents(NamedTuple):
    """The documents of a batch: offsets and real lengths as the caller passed them, or as a plan has them."""

    cu_seqlens: Any
    lengths: Any
    on_host: tuple  # both as the host may know them
    plan: object = None
    parts: Parts | None = None  # of a rank that has rows for whole documents and for split documents
    tokens: int = 0  # rows of each rank in a plan
    sizes: HostSizes | None = None


def _documents_of(given, lengths, layout: str, rank, world_size: int | None, place: Place, device) -> _Documents:
    """Return the documents of the arguments of `prepare_batch`; `ValueError` for options that a plan decides."""
    if not isinstance(given, DocumentPlan | Parts):
        return _Documents(given, lengths, (given, lengths))
    for name, x, default in (("lengths", lengths, None), ("layout", layout, Layout.DOCUMENT)):
        if x is not default and x != default:
            raise ValueError(f"{name}: expected {default} with a plan, got {x!r}")
    world_size = place.world_size if world_size is None else world_size
    on_host = None
    if isinstance(given, Parts):
        parts = given.checked()
    else:
        check_plan(given, world_size)
        parts = Parts.of_plan(given, place.rank if rank is None else rank, device)
        on_host = given.split_cu_seqlens, given.split_lengths
    # The offsets of a single rank, and of ranks without whole documents, describe all rows.
    in_two_parts = world_size != 1 and parts.whole_tokens > 0
    cu_seqlens, lengths = parts.joined() if world_size == 1 else (parts.split_cu_seqlens, parts.split_lengths)
    return _Documents(
        cu_seqlens,
        lengths,
        on_host or (cu_seqlens, lengths),
        given,
        parts if in_two_parts else None,
        parts.tokens,
        parts.sizes,
    )


def _placed(
    cu_seqlens, rank: int | torch.Tensor | None, world_size: int | None, place: Place, layout: Layout
) -> tuple[torch.Tensor, int | torch.Tensor, int]:
    """Return the checked (cu_seqlens, rank, world_size); `ValueError` if they contradict the group."""
    if place.group_name is None:
        world_size = check_world_size(1 if world_size is None else world_size)
        if rank is None and world_size > 1:
            raise ValueError(f"rank: expected the rank to prepare for, as world_size is {world_size}, got None")
        return check_batch(cu_seqlens, 0 if rank is None else rank, world_size, layout)
    own_rank = place.rank if rank is None else rank
    cu_seqlens, own_rank, _ = check_batch(cu_seqlens, own_rank, place.world_size, layout)
    if isinstance(own_rank, torch.Tensor) or own_rank != place.rank:
        raise ValueError(f"rank: expected None or that in the group, {place.rank}, got {rank}")
    if world_size is not None and check_world_size(world_size) != place.world_size:
        raise ValueError(f"world_size: expected None or the size of the group, {place.world_size}, got {world_size}")
    return cu_seqlens, place.rank, place.world_size
