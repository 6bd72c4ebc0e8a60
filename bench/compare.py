"""The implementations that the benchmark compares: this library in both frameworks, and other attentions.

An implementation makes `Calls` of a case, one for each set of inputs; all compute one rank's rows of a zigzag batch.
Implementations without a zigzag layout get K/V that were copied into position order, and their dK/dV are copied back
for the check. Neither copy is timed, although real training would need both. `Unavailable` says why an implementation
cannot run on this machine, or cannot compute a case.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.planning import Planning
from bench.slices import form_of, slices
from bench.timing import Calls, autograd_calls, options_of, places, sinks_of, torch_calls
from tests.support import pieces
from zigzag_torch import execute_grouped_attention
from zigzag_torch.compat import flash2
from zigzag_torch.parallel import Residuals

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


def ours_torch(case, rank, sets, deterministic=True):
    return [torch_calls(case, rank, *tensors, backend=BACKEND, deterministic=deterministic) for tensors in sets]


def unfused(case, rank, sets):
    """The published path: it copies keys into position order, slices them, and attends by chunk; all of it is timed."""
    _check_plain(case)

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
    _check_plain(case)

    def calls(q, k, v, dout, cu_seqlens):
        copied = slices(case, rank, cu_seqlens.device)
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


def flash4_torch(case, rank, sets, deterministic=False):
    """FlashAttention-4 (flash_attn.cute), one call for all chunks."""
    from flash_attn.cute import flash_attn_varlen_func

    if case.attention_chunk:
        raise Unavailable("not expressible: it has no chunks of attention")
    window = tuple(None if side < 0 else side for side in case.window_size)
    options = {"causal": case.causal, "window_size": window, "softcap": case.softcap, "deterministic": deterministic}

    def calls(q, k, v, dout, cu_seqlens):
        copied = slices(case, rank, q.device)
        sizes = zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), copied.lengths, strict=False)
        arguments = dict(sizes) | options

        def attend(q, k, v, sinks=None):
            out = flash_attn_varlen_func(q, k, v, learnable_sink=sinks, **arguments)
            return out[0] if isinstance(out, tuple) else out

        made = autograd_calls(attend, (q, k[copied.rows], v[copied.rows], *sinks_of(case, q.device)), dout)

        def results():
            out, dq, dk, dv, *dsinks = made.results()
            return out, dq, copied.spread(dk, k), copied.spread(dv, v), *dsinks

        return made._replace(results=results)

    return [calls(*tensors) for tensors in sets]


def _check_plain(case):
    """Raise `Unavailable` for options that the implementation does not pass on."""
    if case.has_options:
        raise Unavailable("compared only without windows, caps, sinks and the row layout")


def _check_one_mask(case):
    """Raise `Unavailable` for cases whose causal mask these interfaces would align differently.

    They align the first row with the first key. In a late chunk, the last row must be aligned with the last key.
    """
    _check_plain(case)
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

    return [autograd_calls(attend, tensors[:3], tensors[3]) for tensors in sets]


def flex_torch(case, rank, sets):
    """FlexAttention on the gathered buffer in place, with documents and zigzag positions as its mask."""
    _check_plain(case)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cu_seqlens = sets[0][-1]
    (q_sequence, q_position), (k_sequence, k_position) = places(case, rank, cu_seqlens)

    def visible(batch, head, row, key):
        same = q_sequence[row] == k_sequence[key]
        return same & (q_position[row] >= k_position[key]) if case.causal else same

    torch._dynamo.reset()
    # The backward pass is repeated on the saved tensors of one forward pass.
    torch._functorch.config.donated_buffer = False
    mask = create_block_mask(visible, None, None, case.tokens, case.total, device=cu_seqlens.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)[0].transpose(0, 1)

    return [autograd_calls(attend, tensors[:3], tensors[3]) for tensors in sets]


def jax_calls(attend, arrays, extra=()):
    """`Calls` of `attend(*leaves, *extra)` for each (*leaves, dout) of `arrays`, compiled once; without `results`."""
    import jax

    # JAX caches a custom gradient as it was first traced, with the environment of that time.
    jax.clear_caches()
    *leaves, dout = arrays[0]
    forward = jax.jit(attend).lower(*leaves, *extra).compile()

    @jax.jit
    def differentiate(leaves, extra):
        return jax.vjp(lambda *x: attend(*x, *extra), *leaves)[1]

    differentiate = differentiate.lower(leaves, extra).compile()
    pullbacks = [differentiate(x, extra) for *x, _ in arrays]
    backward = jax.jit(lambda pullback, dout: pullback(dout)).lower(pullbacks[0], dout).compile()
    return [
        (functools.partial(forward, *leaves, *extra), functools.partial(backward, pullback, dout))
        for (*leaves, dout), pullback in zip(arrays, pullbacks, strict=True)
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
    sinks = sinks_of(case, sets[0][0].device)
    arrays = [to_jax(q, k, v, *sinks, dout) for q, k, v, dout, _ in sets]
    (cu_seqlens,) = to_jax(sets[0][-1])
    batch = zigzag_jax.prepare_batch(cu_seqlens, rank, case.world_size, backend=BACKEND, **form_of(case))
    options = options_of(case) | {"backend": BACKEND, "deterministic": deterministic}

    def attend(q, k, v, *others):
        *sinks, batch = others
        sinks = sinks[0] if sinks else None
        return zigzag_jax.zigzag_attention_gathered(q, k, v, batch, rank, case.world_size, sinks=sinks, **options)

    def with_results(forward, backward):
        return Calls(forward, backward, lambda: tuple(map(torch.from_dlpack, (forward(), *backward()))))

    return [with_results(*calls) for calls in jax_calls(attend, arrays, (batch,))]


def flash3_jax(case, rank, sets):
    """FlashAttention-3 as the package flash-attn3-jax has it, one call for all chunks."""
    try:
        from flash_attn3_jax import flash_mha_varlen
    except ImportError as error:
        raise Unavailable(f"needs the package flash-attn3-jax: {error}") from error
    _check_plain(case)
    copied = slices(case, rank, sets[0][-1].device)
    _, _, max_q, max_k, _ = copied.lengths

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
    "flash4-torch": Implementation(TORCH, flash4_torch),
    "flash4-deterministic": Implementation(TORCH, functools.partial(flash4_torch, deterministic=True)),
    "cudnn-torch": Implementation(TORCH, cudnn_torch),
    "cudnn-jax": Implementation(JAX, cudnn_jax),
    "flex-torch": Implementation(TORCH, flex_torch),
}


class Ready(NamedTuple):
    """An implementation with its calls for one case; `planning` is to be entered around them."""

    name: str
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
    return Ready(name, implementation, planning, calls)
