"""The published zigzag llama3 path, put together for one rank of a case, and its expected results."""

import contextlib
from unittest import mock

import numpy as np
import torch

import zigzag_torch
from tests.support.machine import GPU
from tests.support.rank import rank_arrays, rank_results
from zigzag_torch import launch

DEVICE = "cuda" if GPU else "cpu"


def tensor(x, dtype="float32"):
    return torch.tensor(x, dtype=getattr(torch, dtype), device=DEVICE)


def rank_tensors(case, rank, inputs):
    """q `[T, ...]` and gathered kv `[2, W * T, ...]` that require gradients, cotangents of the rows that are used."""
    q, k, v, dout, dlse = rank_arrays(case, inputs, rank)
    used = case.tokens - case.padding
    return (
        tensor(q, case.dtype).requires_grad_(),
        tensor(np.stack([k, v]), case.dtype).requires_grad_(),
        tensor(dout[:used], case.dtype),
        tensor(dlse[:, :used]),
    )


def rank_oracle(case, rank, inputs, arithmetic):
    """out, lse, dq, dk, dv of one rank by the oracle, the results without padding."""
    used = case.tokens - case.padding
    expected = rank_results(case, inputs, rank, arithmetic)
    return expected | {"out": expected["out"][:used], "lse": expected["lse"][:, :used]}


def grouped_arguments(q, kv, cu_seqlens, rank, world_size, causal, n_chunks=2):
    """The arguments of `execute_grouped_attention` from q `[T, heads, d]`, gathered kv and global `cu_seqlens`."""
    cu_seqlens = cu_seqlens // world_size
    chunks = zigzag_torch.split_q_by_zigzag_chunk_index(q, cu_seqlens, world_size, rank, n_chunks)
    of_rank = rank, 2 * world_size - 1 - rank
    slices = zigzag_torch.compute_kv_slices_for_groups(cu_seqlens, *of_rank, world_size, chunks[1], n_chunks)
    names = "chunk_q_list", "chunk_cu_seqlens_q_list", "chunk_indices_list"
    return dict(zip(names, chunks, strict=True)) | {
        "kv_buffer": kv,
        "kv_slices": slices,
        "nheads": q.shape[1],
        "head_dim": q.shape[2],
        "softmax_scale": None,
        "dropout_p": 0.0,
        "causal": causal,
        "window_size": (-1, -1),
        "alibi_slopes": None,
        "deterministic": False,
        "world_size": world_size,
        "cu_seqlens_k": cu_seqlens,
    }


def fused_arguments(arguments, rank):
    """Return the arguments of the fused replacement, from `grouped_arguments`."""
    return arguments | {"chunk_idx_0": rank, "chunk_idx_1": 2 * arguments["world_size"] - 1 - rank}


def grouped(case, rank, q, kv, n_chunks=2, fused=False, **options):
    """Call `execute_grouped_attention`, or its fused replacement, with the arguments that `grouped_arguments` makes."""
    cu_seqlens = tensor(case.cu_seqlens, "int32")
    arguments = grouped_arguments(q, kv, cu_seqlens, rank, case.world_size, case.causal, n_chunks)
    options = {"softmax_scale": case.softmax_scale, "window_size": case.window_size} | options
    if not fused:
        return zigzag_torch.execute_grouped_attention(**arguments | options)
    return zigzag_torch.replace_grouped_attention_with_fused_triton_v2(**fused_arguments(arguments, rank) | options)


@contextlib.contextmanager
def kernels(backend):
    """Make `backend` the default in this context, so that the kernels run on a CPU too, not the reference.

    None changes nothing.
    """
    choose = launch.choose_backend
    with mock.patch.object(launch, "choose_backend", lambda _, device: choose(backend, device)):
        yield
