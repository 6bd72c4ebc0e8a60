"""`prepare_batch`, which checks the documents of a training step and builds the tables that all layers share."""

import dataclasses

import jax.numpy as jnp

from zigzag_kernels.batch_checks import check_form
from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import check_layout, check_method, check_world_size
from zigzag_kernels.documents import DocumentPlan, check_plan
from zigzag_kernels.modes import Backend, Layout

from . import launch
from .arguments import Array, as_cu_seqlens, as_lengths, check_array
from .axes import AxisName, place_on
from .batch import (
    Batch,
    Form,
    as_batch,
    check_same_on_every_rank,
    check_varying,
    compare,
    marked,
    tables_of,
)
from .halos import halo_of_batch
from .host import ShardedBatch
from .plans import Parts, offsets_of, one_part
from .surroundings import under_own_promotion


@under_own_promotion
def prepare_batch(
    cu_seqlens: Array | DocumentPlan | ShardedBatch | Parts,
    rank: int | Array | None = None,
    world_size: int | None = None,
    *,
    axis_name: AxisName | None = None,
    method: str | None = None,
    backend: str | None = None,
    unsharded: Array | None = None,
    lengths: Array | None = None,
    layout: str = "document",
    row_length: int | None = None,
    rows: int = 1,
    window_size: tuple[int | None, int | None] = NO_WINDOW,
    attention_chunk: int = 0,
    max_seqlen: int | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and for both passes.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences over all ranks; may be traced. Other integers are
            converted; a list, tuple or NumPy array is checked as in `validate`. Instead of offsets, pass a plan of
            `plan_documents`, or a `host.ShardedBatch`, inside `shard_map` with its `specs`: each rank then has the rows
            of the plan, whole documents first.
        rank: an int, or an array of one integer, which may be traced. None means the rank on the mesh axis, or 0 on a
            single device.
        world_size: number of ranks. None means the size of the mesh axis, or 1.
        axis_name: mesh axis, or axes, of the attention calls inside `shard_map`; `rank` and `world_size` are then None.
            The ranks compare their `cu_seqlens`: if they differ, attention returns NaN on all ranks.
        method: as in the attention calls. None means "halo" if the host knows that halos suffice for `window_size`,
            `attention_chunk` or `max_seqlen`, and otherwise "allgather". The host knows it in the row layout, and for
            offsets on the host.
        backend: as in the attention calls.
        unsharded: the whole batch before `shard`, such as token ids; its spec is `P()`. With `axis_name`, ranks compare
            it like `cu_seqlens`, because processes with different data would attend to a mixture of both.
        lengths: `[N]` int32, the real tokens of each sequence; may be traced. The other rows, at the end of a sequence,
            are padding, with out 0, lse -inf and zero gradients, and no row attends to them. A negative length, or one
            above the length of the sequence, gives NaN everywhere, or an error if both `lengths` and `cu_seqlens` are
            lists, tuples or NumPy arrays.
        layout: as in the attention calls, which must get the same layout.
        row_length, rows: required in the row layout with several ranks. `row_length` is the number of tokens of one
            packed row over all ranks, a multiple of `2 * world_size`; `rows` is the number of packed rows.
        window_size, attention_chunk: for methods None and "halo", the largest window of all layers that will use the
            batch. It decides how many rows a halo has, for layers with smaller windows too.
        max_seqlen: a promise that no document has more real tokens. With method "halo" it also limits the rows of a
            halo. If a batch breaks the promise, that method gives NaN everywhere, or an error if the host has the
            values.

    Raises the errors of `zigzag_attention_gathered`.
    """
    if method is not None:
        check_method(method)
    check_layout(layout)
    if axis_name is not None:
        for name, x in {"rank": rank, "world_size": world_size}.items():
            if x is not None:
                raise ValueError(f"{name}: expected None with axis_name, which gives it, got {x}")
        rank, world_size = place_on(axis_name)
    world_size = check_world_size(1 if world_size is None else world_size)
    if rank is None and world_size > 1:
        raise ValueError(f"rank: expected the rank to prepare for, as world_size is {world_size}, got None")
    rank = 0 if rank is None else rank
    by_default, backend = backend is None, launch.choose_backend(backend)
    parts, tokens = None, 0
    if isinstance(cu_seqlens, ShardedBatch):
        unsharded = cu_seqlens.fingerprint if unsharded is None else unsharded
        cu_seqlens, row_length = offsets_of(cu_seqlens, world_size, layout)
    form = Form(*check_form(layout, row_length, rows, world_size))
    if isinstance(cu_seqlens, DocumentPlan | Parts):
        for name, x, default in (("lengths", lengths, None), ("layout", layout, Layout.DOCUMENT)):
            if x is not default and x != default:
                raise ValueError(f"{name}: expected {default} with a plan, got {x!r}")
        if isinstance(cu_seqlens, DocumentPlan):
            cu_seqlens = Parts.of_plan(check_plan(cu_seqlens, world_size), rank)
        tokens = cu_seqlens.tokens
        cu_seqlens, lengths, parts = one_part(cu_seqlens, world_size)
    if parts is not None:
        if axis_name is None:
            raise ValueError("axis_name: expected that of the ranks of a plan with whole and split documents, got None")
        form = form._replace(whole_tokens=parts.whole_tokens)
    form = form._replace(tokens=tokens)
    reach, packed = (window_size, attention_chunk, max_seqlen), (form.row_length, form.rows)
    method, halo, promised = halo_of_batch(method, reach, (cu_seqlens, lengths), packed, world_size)
    batch = as_batch(cu_seqlens, rank, world_size, method, form)
    if parts is not None:
        batch = dataclasses.replace(batch, whole_cu_seqlens=as_cu_seqlens(parts.whole_cu_seqlens, 1))
    # Without documents there is no array of lengths: XLA of JAX 0.11.2 crashes while it compiles a program for several
    # GPUs that returns an empty array which it got.
    if lengths is not None and (real := as_lengths(lengths, cu_seqlens)).size:
        batch = dataclasses.replace(batch, lengths=real)
    batch = dataclasses.replace(batch, halo=halo, max_seqlen=promised)
    check_varying(batch, axis_name)
    if unsharded is not None:
        check_array("unsharded", unsharded)
        check_same_on_every_rank(axis_name, unsharded=jnp.asarray(unsharded))
        if unsharded.ndim and not (form.row_length or form.tokens):  # other forms say how many rows a rank has
            batch = dataclasses.replace(batch, unsharded_rows=unsharded.shape[0])
    if axis_name is not None:
        batch = compare(batch, axis_name, unsharded)
    batch = marked(batch, backend, by_default)
    if backend == Backend.REFERENCE:
        return batch
    return dataclasses.replace(batch, **tables_of(batch, backend)._asdict())
