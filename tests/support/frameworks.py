"""Each framework's attention of one rank as the same NumPy function, so that one test can ask both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

import zigzag_jax
import zigzag_torch
from tests.support.cases import RESULTS
from tests.support.processes import torch_numpy


def attend_torch(case, q, k, v, dout, dlse, rank, backend, deterministic=True):
    """`q [T, ...]`, gathered `k, v`, cotangents -> {name: array}: RESULTS, in the kernel's own dtype."""
    device = "cuda" if backend == "triton" else "cpu"
    dtype = getattr(torch, case.dtype)
    q, k, v = (torch.tensor(x, dtype=dtype, device=device, requires_grad=True) for x in (q, k, v))
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)
    out, lse = zigzag_torch.zigzag_attention_gathered(
        q, k, v, cu_seqlens, rank, case.world_size, causal=case.causal, softmax_scale=case.softmax_scale,
        return_lse=True, backend=backend, deterministic=deterministic,
    )  # fmt: skip
    cotangents = torch.tensor(dout, dtype=dtype, device=device), torch.tensor(dlse, device=device)
    gradients = torch.autograd.grad((out, lse), (q, k, v), cotangents)
    results = (out, lse, *gradients)
    return {name: torch_numpy(x) for name, x in zip(RESULTS, results, strict=True)}


@functools.cache
def _jax_attention(case, backend, deterministic):
    """The compiled function of one case; the rank is traced, so that all ranks share it."""

    @jax.jit
    def run(q, k, v, dout, dlse, cu_seqlens, rank):
        def attend(q, k, v):
            return zigzag_jax.zigzag_attention_gathered(
                q, k, v, cu_seqlens, rank, case.world_size, causal=case.causal, softmax_scale=case.softmax_scale,
                return_lse=True, backend=backend, deterministic=deterministic,
            )  # fmt: skip

        results, pullback = jax.vjp(attend, q, k, v)
        return *results, *pullback((dout, dlse))

    return run


def attend_jax(case, q, k, v, dout, dlse, rank, backend, deterministic=True):
    """As `attend_torch`."""
    q, k, v, dout = (jnp.asarray(x, case.dtype) for x in (q, k, v, dout))
    cu_seqlens = np.array(case.cu_seqlens, np.int32)
    run = _jax_attention(case, backend, deterministic)
    results = run(q, k, v, dout, jnp.asarray(dlse), cu_seqlens, np.array([rank], np.int32))
    return {name: np.asarray(x) for name, x in zip(RESULTS, results, strict=True)}
