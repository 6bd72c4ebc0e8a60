"""The implementations that the benchmark compares: this library in both frameworks, and other attentions.

An implementation makes `Calls` of a case, one for each set of inputs; all compute one rank's rows of a zigzag batch.
Those that know no zigzag layout get K/V that were copied together before, and their dK/dV are put back only to be
checked: neither is timed, though somebody has to do it. `Unavailable` says why one cannot run, here or at all.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.planning import Planning
from bench.timing import Calls, autograd_calls, places, torch_calls
from tests.support import pieces
from zigzag_torch import execute_grouped_attention
from zigzag_torch.compat import flash2
from zigzag_torch.parallel import Residuals
from zigzag_torch.shard import position_order

TORCH, JAX = FRAMEWORKS = ("torch", "jax")
BACKEND = None  # of this library's calls: the kernels on a GPU


class Unavailable(Exception):
    """The reason why an implementation cannot compute a case, or cannot run on this machine."""


@dataclass(frozen=True)
class Implementation:
    """One implementation, as `make(case, rank, sets) -> [Calls]`.

    If an implementation that is `ours` fails, so does the benchmark.
    """

    framework: str
    make: Callable[..., list[Calls]]
    environment: dict[str, str] = field(default_factory=dict)  # under which this library plans its launches
    ours: bool = False
    twin: str | None = None  # the implementation whose results are to be the same bit for bit
    hopper: bool = False  # only of interest where a kernel for Hopper serves


class Slices(NamedTuple):
    """Every run of a rank's rows with the keys that it sees, as one ordinary packed batch.

    Attention without zigzag can compute it.
    """

    rows: torch.Tensor  # of the gathered buffer, in the order in which they are copied together
    lengths: flash2.Lengths

    def spread(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Gradients of the copied rows summed into the layout of the gathered buffer, in float32."""
        return torch.zeros_like(like, dtype=torch.float32).index_add_(0, self.rows, x.float())


def slices(case, rank, cu_seqlens) -> Slices:
    """The runs are a rank's two chunks of each sequence, or whole sequences where their keys are the same."""
    whole = case.world_size == 1 or not case.causal
    queries, keys = [], []
    for start, length in zip(case.cu_seqlens, case.lengths, strict=False):
        if whole:
            queries.append(length // case.world_size)
            keys.append((start, start + length))
            continue
        chunk = length // (2 * case.world_size)
        queries += [chunk, chunk]
        keys += [(start, start + (i + 1) * chunk) for i in (rank, 2 * case.world_size - 1 - rank)]
    order = position_order(cu_seqlens, case.world_size, case.total)
    seen = [end - start for start, end in keys]
    offsets = (cu_seqlens.new_tensor([*accumulate(x, initial=0)]) for x in (queries, seen))
    return Slices(
        torch.cat([order[start:end] for start, end in keys]), flash2.Lengths(*offsets, max(queries), max(seen))
    )


def ours_torch(case, rank, sets, deterministic=True):
    return [torch_calls(case, rank, *tensors, backend=BACKEND, deterministic=deterministic) for tensors in sets]


def unfused(case, rank, sets):
    """The published path: keys put in position order, then sliced and attended chunk by chunk, all of it timed."""

    def calls(q, k, v, dout, cu_seqlens):
        kv = torch.stack((k, v))
        arguments = pieces.grouped_arguments(q, kv, cu_seqlens, rank, case.world_size, case.causal)
        leaves = [x.detach().requires_grad_() for x in (*arguments["chunk_q_list"], kv)]
        arguments |= {"chunk_q_list": leaves[:-1], "kv_buffer": leaves[-1]}

        def forward():
            return execute_grouped_attention(**arguments)[0]

        out = forward()

        def backward():
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        def results():
            *dq_chunks, dkv = backward()
            dq = torch.empty_like(q)
            for rows, x in zip(arguments["chunk_indices_list"], dq_chunks, strict=True):
                dq[rows] = x
            return forward().detach(), dq, *dkv

        return Calls(forward, backward, results)

    if case.world_size == 1:
        raise Unavailable("it divides sequences among two ranks or more")
    return [calls(*tensors) for tensors in sets]


def flash2_torch(case, rank, sets):
    """PyTorch's FlashAttention-2 operator, one call for all chunks."""

    def calls(q, k, v, dout, cu_seqlens):
        copied = slices(case, rank, cu_seqlens)
        keys, values = k[copied.rows], v[copied.rows]
        options = copied.lengths, flash2.Mask(case.causal), case.head_dim**-0.5
        out, lse = flash2.forward(q, keys, values, *options)

        def backward():
            return flash2.backward(Residuals(q, keys, values, out, lse), dout, None, *options, False)

        def results():
            dq, dk, dv = backward()
            return out, dq, copied.spread(dk, k), copied.spread(dv, v)

        return Calls(lambda: flash2.forward(q, keys, values, *options)[0], backward, results)

    return [calls(*tensors) for tensors in sets]


def _check_one_mask(case):
    """Raise `Unavailable` for cases whose causal mask both interfaces would place differently.

    They align the first row with the first key, but the last row of a late chunk belongs to the last key.
    """
    if len(case.lengths) != 1 or (case.causal and case.world_size > 1):
        raise Unavailable(
            "not expressible: one sequence, and a causal mask that begins at the first key, is all it has"
        )


def cudnn_torch(case, rank, sets):
    _check_one_mask(case)

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)
        return out[0].transpose(0, 1)

    return [autograd_calls(attend, *tensors[:4]) for tensors in sets]


def flex_torch(case, rank, sets):
    """FlexAttention on the gathered buffer in place, with documents and zigzag positions as its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cu_seqlens = sets[0][-1]
    (q_sequence, q_position), (k_sequence, k_position) = places(case, rank, cu_seqlens)

    def visible(batch, head, row, key):
        same = q_sequence[row] == k_sequence[key]
        return same & (q_position[row] >= k_position[key]) if case.causal else same

    torch._dynamo.reset()
    # The backward pass is repeated on what one forward pass has kept.
    torch._functorch.config.donated_buffer = False
    mask = create_block_mask(visible, None, None, case.tokens, case.total, device=cu_seqlens.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)[0].transpose(0, 1)

    return [autograd_calls(attend, *tensors[:4]) for tensors in sets]


def jax_calls(attend, arrays, extra=()):
    """`Calls` of `attend(q, k, v, *extra)` for each (q, k, v, dout) of `arrays`, compiled once; without `results`."""
    import jax

    # A custom gradient remembers how it was traced, under whatever environment.
    jax.clear_caches()
    qkv, dout = arrays[0][:3], arrays[0][3]
    forward = jax.jit(attend).lower(*qkv, *extra).compile()

    @jax.jit
    def differentiate(q, k, v, *extra):
        return jax.vjp(lambda *x: attend(*x, *extra), q, k, v)[1]

    differentiate = differentiate.lower(*qkv, *extra).compile()
    pullbacks = [differentiate(*x[:3], *extra) for x in arrays]
    backward = jax.jit(lambda pullback, dout: pullback(dout)).lower(pullbacks[0], dout).compile()
    return [
        (functools.partial(forward, *x[:3], *extra), functools.partial(backward, pullback, x[3]))
        for x, pullback in zip(arrays, pullbacks, strict=True)
    ]


def to_jax(*tensors):
    """The same memory as JAX arrays."""
    import jax

    if tensors[0].is_cuda and jax.default_backend() != "gpu":
        raise Unavailable("JAX sees no GPU: it needs its CUDA plugin")
    return tuple(jax.dlpack.from_dlpack(x.detach().contiguous()) for x in tensors)


def ours_jax(case, rank, sets, deterministic=True):
    import zigzag_jax

    if sets[0][0].is_cuda and importlib.util.find_spec("jax_triton") is None:
        raise Unavailable("not installed: jax-triton")
    arrays = [to_jax(*tensors) for tensors in sets]
    batch = zigzag_jax.prepare_batch(arrays[0][-1], rank, case.world_size, backend=BACKEND)

    def attend(q, k, v, batch):
        return zigzag_jax.zigzag_attention_gathered(
            q, k, v, batch, rank, case.world_size, causal=case.causal, backend=BACKEND, deterministic=deterministic
        )

    def with_results(forward, backward):
        return Calls(forward, backward, lambda: tuple(map(torch.from_dlpack, (forward(), *backward()))))

    return [with_results(*calls) for calls in jax_calls(attend, arrays, (batch,))]


def flash3_jax(case, rank, sets):
    """FlashAttention-3 as the package flash-attn3-jax has it, one call for all chunks."""
    try:
        from flash_attn3_jax import flash_mha_varlen
    except ImportError as error:
        raise Unavailable(f"needs the package flash-attn3-jax: {error}") from error
    copied = slices(case, rank, sets[0][-1])
    _, _, max_q, max_k = copied.lengths

    def attend(q, k, v, cu_seqlens_q, cu_seqlens_k):
        return flash_mha_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
            softmax_scale=case.head_dim**-0.5, is_causal=case.causal,
        )  # fmt: skip

    def with_results(forward, backward, k, v):
        def results():
            out, dq, dk, dv = map(torch.from_dlpack, (forward(), *backward()))
            return out, dq, copied.spread(dk, k), copied.spread(dv, v)

        return Calls(forward, backward, results)

    arrays = [to_jax(q, k[copied.rows], v[copied.rows], dout) for q, k, v, dout, _ in sets]
    calls = jax_calls(attend, arrays, to_jax(*copied.lengths[:2]))
    return [with_results(*x, *tensors[1:3]) for x, tensors in zip(calls, sets, strict=True)]


def cudnn_jax(case, rank, sets):
    _check_one_mask(case)
    import jax

    def attend(q, k, v):
        q, k, v = (x[None] for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=case.causal, implementation="cudnn")[0]

    def with_results(forward, backward):
        return Calls(forward, backward, lambda: tuple(map(torch.from_dlpack, (forward(), *backward()))))

    return [with_results(*calls) for calls in jax_calls(attend, [to_jax(*tensors[:4]) for tensors in sets])]


_PORTABLE, _HOPPER = {"ZIGZAG_HOPPER": "0"}, {"ZIGZAG_HOPPER": "1"}
_fused_torch, _fused_jax = (functools.partial(make, deterministic=False) for make in (ours_torch, ours_jax))
IMPLEMENTATIONS = {
    "torch": Implementation(TORCH, ours_torch, _PORTABLE, ours=True),
    "jax": Implementation(JAX, ours_jax, _PORTABLE, ours=True, twin="torch"),
    "torch-hopper": Implementation(TORCH, ours_torch, _HOPPER, ours=True, hopper=True),
    "jax-hopper": Implementation(JAX, ours_jax, _HOPPER, ours=True, hopper=True, twin="torch-hopper"),
    "torch-fused": Implementation(TORCH, _fused_torch, _HOPPER, ours=True, hopper=True),
    "jax-fused": Implementation(JAX, _fused_jax, _HOPPER, ours=True, hopper=True),
    "unfused": Implementation(TORCH, unfused),
    "flash2-torch": Implementation(TORCH, flash2_torch),
    "flash3-jax": Implementation(JAX, flash3_jax),
    "cudnn-torch": Implementation(TORCH, cudnn_torch),
    "cudnn-jax": Implementation(JAX, cudnn_jax),
    "flex-torch": Implementation(TORCH, flex_torch),
}


class Ready(NamedTuple):
    """An implementation with its calls for one case; to be entered around them."""

    implementation: Implementation
    planning: Planning
    calls: list[Calls]


def prepare(name: str, case, rank: int, sets) -> Ready:
    """The implementation `name` on every one of `sets` of inputs; `Unavailable`, or what it raises."""
    implementation = IMPLEMENTATIONS[name]
    planning = Planning(**implementation.environment)
    with planning:
        try:
            calls = implementation.make(case, rank, sets)
        except ImportError as error:
            raise Unavailable(f"not installed: {error}") from error
    if implementation.hopper and not planning.takes_hopper_kernels:
        raise Unavailable("no kernel for Hopper serves here")
    return Ready(implementation, planning, calls)
