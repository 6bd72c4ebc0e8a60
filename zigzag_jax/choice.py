"""The choice of a method for a call whose caller named none, and the halo of a call."""

import dataclasses

import jax

from zigzag_kernels import halo
from zigzag_kernels.callspec import CallSpec

from .batch import Batch
from .halos import check_documents


def choose_method(
    cu_seqlens,
    mask: tuple[bool, tuple, int],
    shape: tuple[int, int],
    layout: str,
    world_size: int,
    heads_k_stride: int | None,
):
    """Return (`cu_seqlens`, method) for a call whose caller named no method.

    `mask` is (causal, window_size, attention_chunk), `shape` is (number of sequences or packed rows, rows of each on
    this rank). If a prepared batch has halos and the mask reaches farther, the result is that batch with method
    "allgather" and without tables.
    """
    prepared = None
    if isinstance(cu_seqlens, Batch):
        prepared = cu_seqlens.method, cu_seqlens.halo, cu_seqlens.max_seqlen
    form = None if cu_seqlens is None else layout
    method = halo.method_of_call(prepared, mask, shape, form, world_size, heads_k_stride)
    if isinstance(cu_seqlens, Batch) and cu_seqlens.method != method:
        cu_seqlens = dataclasses.replace(cu_seqlens, method=method, segments=None, sequences=None, halo=0)
    return cu_seqlens, method


def with_halo(call: CallSpec, batch: Batch, q: jax.Array, length: int, given) -> tuple[CallSpec, Batch]:
    """Return `call` and `batch` with their halo filled in.

    `length` is the number of tokens of every document if all have the same length, otherwise 0. `given` is the argument
    `cu_seqlens` of the call. Raises `ValueError` if the host knows that a chunk is shorter than the halo.
    """
    sizes = {"tokens": q.shape[0] - batch.whole_tokens, "sequences": batch.cu_seqlens.shape[0] - 1}
    sizes |= {"packed_rows": batch.rows, "world_size": batch.world_size}
    call = halo.with_halo(call, batch.halo, batch.max_seqlen, **sizes)
    halo.check_halo_in_chunk(call.halo, length, batch.world_size)
    if given is not None and not isinstance(given, Batch):
        check_documents(given, batch.world_size, batch.row_length or None, call.halo)
    return call, batch if batch.halo else dataclasses.replace(batch, halo=call.halo)
