"""The attention of one rank in each framework, as functions of NumPy arrays, so that one test can check both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

import zigzag_jax
import zigzag_torch
from tests.support.processes import torch_numpy


def attend_torch(case, q, k, v, dout, dlse, rank, backend, *, deterministic=True, sinks=None):
    """`q [T, ...]`, gathered `k, v`, cotangents -> {name: array}: the case's results, in the kernel's own dtype."""
    device = "cuda" if backend == "triton" else "cpu"
    dtype = getattr(torch, case.dtype)
    leaves = [torch.tensor(x, dtype=dtype, device=device, requires_grad=True) for x in (q, k, v)]
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)
    options = call_options(case)
    if sinks is not None:
        leaves.append(torch.tensor(sinks, device=device, requires_grad=True))
        options["sinks"] = leaves[-1]
    if case.lengths_real is not None or case.row_length:
        cu_seqlens = prepare_torch(case, cu_seqlens, rank, backend)
    out, lse, *max_logits = zigzag_torch.zigzag_attention_gathered(
        *leaves[:3], cu_seqlens, rank, case.world_size, return_lse=True, backend=backend, deterministic=deterministic,
        **options,
    )  # fmt: skip
    cotangents = torch.tensor(dout, dtype=dtype, device=device), torch.tensor(dlse, device=device)
    dq, dk, dv, *dsinks = torch.autograd.grad((out, lse), leaves, cotangents)
    results = out, lse, dq, dk, dv, *max_logits, *dsinks
    return {name: torch_numpy(x) for name, x in zip(case.results, results, strict=True)}


def jax_host_array(x):
    """Return `x` as an array of JAX in the memory of the host, whose values helpers read and check."""
    return jax.device_put(x, jax.local_devices(backend="cpu")[0])


def call_options(case):
    """Keyword arguments of the calls in both frameworks, sinks aside."""
    options = {"causal": case.causal, "softmax_scale": case.softmax_scale}
    if case.has_options:
        names = "window_size", "attention_chunk", "softcap", "layout"
        options |= {name: getattr(case, name) for name in names} | {"return_max_logits": True}
    return options


def prepare_torch(case, cu_seqlens, rank, backend, **others):
    """The prepared batch of `case`; `others` may be a group, which knows the rank, and a method."""
    of_rank = {} if "group" in others else {"rank": rank, "world_size": case.world_size}
    lengths = None if case.lengths_real is None else cu_seqlens.new_tensor(case.lengths_real)
    packed = {"layout": case.layout, "lengths": lengths}
    if case.layout == "row":
        packed |= {"row_length": case.row_length or case.total, "rows": case.rows}
    return zigzag_torch.prepare_batch(cu_seqlens, **of_rank, backend=backend, **packed, **others)


@functools.cache
def _jax_attention(case, backend, deterministic):
    """The compiled function of one case; the rank is traced, so that all ranks share it."""

    @jax.jit
    def run(q, k, v, dout, dlse, cu_seqlens, rank, *sinks):
        options = call_options(case)
        if case.lengths_real is not None or case.row_length:
            of_rank = {"rank": rank, "world_size": case.world_size}
            cu_seqlens = zigzag_jax.prepare_batch(cu_seqlens, backend=backend, **of_rank, **jax_packing(case))

        def attend(q, k, v, *sinks):
            out, lse, *max_logits = zigzag_jax.zigzag_attention_gathered(
                q, k, v, cu_seqlens, rank, case.world_size, return_lse=True, backend=backend,
                deterministic=deterministic, sinks=sinks[0] if sinks else None, **options,
            )  # fmt: skip
            return (out, lse), max_logits

        results, pullback, max_logits = jax.vjp(attend, q, k, v, *sinks, has_aux=True)
        dq, dk, dv, *dsinks = pullback((dout, dlse))
        return *results, dq, dk, dv, *max_logits, *dsinks

    return run


def jax_packing(case):
    """Keyword arguments of `zigzag_jax.prepare_batch` that say how a case is packed."""
    packed = {"layout": case.layout}
    if case.lengths_real is not None:
        packed["lengths"] = jnp.asarray(case.lengths_real, jnp.int32)
    if case.layout == "row":
        packed |= {"row_length": case.row_length or case.total, "rows": case.rows}
    return packed


def attend_jax(case, q, k, v, dout, dlse, rank, backend, *, deterministic=True, sinks=None):
    """Return the results in JAX, like `attend_torch`."""
    q, k, v, dout = (jnp.asarray(x, case.dtype) for x in (q, k, v, dout))
    cu_seqlens = np.array(case.cu_seqlens, np.int32)
    run = _jax_attention(case, backend, deterministic)
    arrays = q, k, v, dout, jnp.asarray(dlse), cu_seqlens, np.array([rank], np.int32)
    results = run(*arrays, *(() if sinks is None else (jnp.asarray(sinks),)))
    return {name: np.asarray(x) for name, x in zip(case.results, results, strict=True)}
