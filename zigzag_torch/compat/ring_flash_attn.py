"""A patch that puts the fused path behind the functions of ring_flash_attn, version 0.1.8, and of its zigzag fork.

The patch replaces the autograd functions that the package's functions call, so that it also works for callers who
imported those functions before. These functions have a layout that the fused path supports:

- `zigzag_ring_flash_attn_varlen_*`: rank r holds chunks r and 2W - 1 - r of every sequence, as in this package.
  `cu_seqlens` are offsets in the local rows.
- `zigzag_ring_flash_attn_*`: the same layout for `[batch, T, heads, head_dim]`.
- `zigzag_llama3_flash_attn_varlen_*`, only in the fork: the same layout; `cu_seqlens_q` are offsets in the local rows,
  `cu_seqlens_k` over all ranks.
- `llama3_flash_attn_varlen_*`: rank r holds the r-th contiguous piece of the batch, which is the zigzag layout only
  with one rank. With more ranks the package's own function runs.
"""

import importlib
import inspect
from typing import Any

import torch

from zigzag_kernels.callspec import NO_WINDOW

from ..api import zigzag_attention
from ..arguments import cast_for_autocast
from ..parallel.agreement import place_in
from .checks import mask_of
from .llama3 import agreed_cu_seqlens, default_group
from .verify import choose_path, fused_backend

_LLAMA3 = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k heads_k_stride local_k_slice"
_OPTIONS = "dropout_p softmax_scale causal window_size alibi_slopes deterministic return_softmax group"
REPLACED = {  # module: autograd function, the parameters of its forward
    "zigzag_ring_flash_attn_varlen": ("ZigZagRingFlashAttnVarlenFunc", f"ctx q k v cu_seqlens max_seqlen {_OPTIONS}"),
    "zigzag_ring_flash_attn": ("ZigZagRingFlashAttnFunc", f"ctx q k v {_OPTIONS}"),
    "llama3_flash_attn_varlen": ("Llama3FlashAttnVarlenFunc", f"ctx {_LLAMA3} {_OPTIONS}"),
}
# In the fork more parameters follow; they choose between ways to compute the same result.
FORK = {"zigzag_llama3_flash_attn_varlen": ("ZigzagLlama3FlashAttnVarlenFunc", f"ctx {_LLAMA3} {_OPTIONS}")}


def patch_ring_flash_attn() -> "Patch":
    """Put the fused path behind the functions of ring_flash_attn, or of its fork, which has the same layout.

    Undo the patch with `.undo()`, or use it as a context manager. The flags of the published names work here too:
    ZIGZAG_USE_FUSED_TRITON_V2=0 calls the package's own function, ZIGZAG_VERIFY_CORRECTNESS=1 compares with it.

    Raises:
        ImportError: the package, or a dependency of it, cannot be imported.
        RuntimeError: the package's functions differ from version 0.1.8, or are already patched. Nothing is replaced.
    """
    found = {}
    for name, (function_name, parameters) in (REPLACED | FORK).items():
        try:
            # Import the package before its module: after a failed import, modules of the package may still be loaded.
            importlib.import_module("ring_flash_attn")
            module = importlib.import_module(f"ring_flash_attn.{name}")
        except ImportError as error:
            if name in FORK and error.name == f"ring_flash_attn.{name}":
                continue
            raise ImportError(
                f"patch_ring_flash_attn: expected ring_flash_attn 0.1.8, which failed: {error}"
            ) from error
        function = getattr(module, function_name, None)
        if isinstance(function, _Fused):
            raise RuntimeError("patch_ring_flash_attn: ring_flash_attn is patched already; undo that first")
        got = " ".join(inspect.signature(function.forward).parameters) if function else "no such function"
        if name in FORK and got.startswith(f"{parameters} "):
            got = parameters
        if got != parameters:
            raise RuntimeError(
                f"patch_ring_flash_attn: expected {name}.{function_name}.forward({parameters}) as in ring_flash_attn "
                f"0.1.8, got {got}"
            )
        found[name] = module, function_name, function
    return Patch(list(found.values()))


class Patch:
    """An active patch: see `patch_ring_flash_attn`."""

    def __init__(self, replaced: list):
        self._replaced = replaced
        for module, name, function in replaced:
            setattr(module, name, _Fused(function, module.__name__ == "ring_flash_attn.llama3_flash_attn_varlen"))

    def undo(self) -> None:
        """Restore the package's own functions; a second call does nothing."""
        while self._replaced:
            module, name, function = self._replaced.pop()
            setattr(module, name, function)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_) -> None:
        self.undo()


class _Fused:
    """A replacement of an autograd function of the package; the package's public functions call its `apply`.

    `contiguous` says that a rank's rows are one piece of the batch, which is the zigzag layout only with one rank.
    """

    def __init__(self, original: Any, contiguous: bool):
        self.original, self.contiguous = original, contiguous
        self.parameters = list(inspect.signature(original.forward).parameters)[1:]

    def apply(self, *args):
        call = dict(zip(self.parameters, args, strict=True))
        group = default_group(call["group"])
        world_size = place_in(group).world_size
        if self.contiguous and world_size > 1:
            return self.original.apply(*args)
        mask = mask_of(call["causal"], call["dropout_p"], call["window_size"], call["alibi_slopes"])

        def fused_path(q, k, v):
            out, lse = zigzag_attention(
                q,
                k,
                v,
                _global_cu_seqlens(call, world_size),
                group=group,
                causal=mask.causal,
                window_size=mask.window_size,
                softmax_scale=call["softmax_scale"],
                heads_k_stride=None if self.contiguous else call.get("heads_k_stride"),
                return_lse=True,
                backend=fused_backend(q.device),
            )
            return out, lse

        def own_path(q, k, v):
            if mask.window_size != NO_WINDOW:
                raise NotImplementedError(
                    f"window_size: only the fused path computes windows across chunks, got {call['window_size']}"
                )
            arguments = call | {"q": q, "k": k, "v": v, "return_softmax": True}
            out, lse, _ = self.original.apply(*arguments.values())
            return out, lse

        inputs = dict(zip("qkv", cast_for_autocast(call["q"], call["k"], call["v"]), strict=True))
        out, lse = choose_path(fused_path, own_path, inputs, ("out", "lse"))
        return (out, lse, None) if call["return_softmax"] else out


def _global_cu_seqlens(call: dict[str, Any], world_size: int) -> torch.Tensor | None:
    """Return the offsets `[N + 1]` int32 over all ranks, from the arguments `call`; None with a batch dimension."""
    if "cu_seqlens" in call:
        return call["cu_seqlens"] * world_size
    if "cu_seqlens_q" in call:
        return agreed_cu_seqlens(call["cu_seqlens_q"], call["cu_seqlens_k"], world_size)
    return None
