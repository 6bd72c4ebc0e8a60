"""The choice of a method for a call that names none, and the halo of a call."""

import dataclasses

import jax

from zigzag_kernels import halo
from zigzag_kernels.callspec import NO_WINDOW, CallSpec
from zigzag_kernels.halo import HostSizes
from zigzag_kernels.modes import Layout, Method

from .batch import Batch


def choose_method(
    cu_seqlens,
    mask: tuple[bool, tuple, int],
    shape: tuple[int, int],
    layout: str,
    world_size: int,
    heads_k_stride: int | None,
):
    """Return (`cu_seqlens`, the method of a call that names none); a prepared batch is then one for that method.

    `shape` is (sequences or packed rows, rows of each on this rank). A prepared batch with halos becomes one of the
    method "allgather", without tables, if the call sees farther.
    """
    if isinstance(cu_seqlens, Batch):
        if cu_seqlens.method != Method.HALO or world_size == 1:
            return cu_seqlens, cu_seqlens.method
        rows_seen = halo.reach_of_mask(*mask, max_seqlen=cu_seqlens.max_seqlen)
        if rows_seen is None or rows_seen > cu_seqlens.halo:
            method = Method.ALLGATHER.value
            cu_seqlens = dataclasses.replace(cu_seqlens, method=method, segments=None, sequences=None, halo=0)
        return cu_seqlens, cu_seqlens.method
    _, window_size, attention_chunk = mask
    if world_size == 1 or heads_k_stride is not None or (window_size is NO_WINDOW and attention_chunk == 0):
        return cu_seqlens, Method.ALLGATHER.value
    sizes, (number, rows) = None, shape
    if cu_seqlens is None:
        sizes = HostSizes(number * rows, number, 0, rows // 2)
    elif layout == Layout.ROW:
        sizes = halo.sizes_of_rows(rows * world_size, number, world_size)
    return cu_seqlens, halo.choose_method(halo.reach_of_mask(*mask, max_seqlen=0), sizes, world_size).value


def with_halo(call: CallSpec, batch: Batch, q: jax.Array, length: int) -> tuple[CallSpec, Batch]:
    """Return `call` and `batch` with the halo that they need; all documents have `length` tokens, 0 if unknown."""
    sizes = {"tokens": q.shape[0] - batch.whole_tokens, "sequences": batch.cu_seqlens.shape[0] - 1}
    sizes |= {"packed_rows": batch.rows, "world_size": batch.world_size}
    call = halo.with_halo(call, batch.halo, batch.max_seqlen, **sizes)
    halo.check_halo_in_chunk(call.halo, length, batch.world_size)
    return call, batch if batch.halo else dataclasses.replace(batch, halo=call.halo)
