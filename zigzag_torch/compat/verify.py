"""The choice between the fused and the unfused path by flags, and the comparison of the two.

The difference of two correct paths depends on the data: gradients are differences of large terms, and rounding errors
matter more the closer these terms cancel. Therefore the unfused path runs once more, with each input and cotangent
changed by one rounding of its dtype. The change of its results is the unit of the allowed difference; `_allowed`
computes the whole limit.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..dispatch import first_derivatives_only, refuse_tangents, transforms_run
from .flags import enabled

BLOCK = 64
"""Rows of one head that are compared together: few enough that one wrong row changes their norm noticeably."""
CHANGES = 2.0
"""Allowed difference of the two paths, in units of the change that one rounding of the inputs causes."""
ROUNDINGS = 16.0
"""Allowed error of one term, in roundings of float32; a sum of n terms may have sqrt(n) times that error."""

Path = Callable[..., tuple[torch.Tensor, ...]]


def choose_path(
    fused: Path, unfused: Path, inputs: dict[str, torch.Tensor], results: Sequence[str]
) -> tuple[torch.Tensor, ...]:
    """Return `fused(*inputs)` or `unfused(*inputs)`, or compare both and return the first, as the flags say.

    `results` are the names of the results of both paths; the name of an lse `[..., heads, rows]` begins with "lse". The
    comparison covers the backward pass too. It raises `AssertionError` with the name of the tensor and the difference.
    """
    tensors = refuse_tangents(*inputs.values())
    if not enabled("use_fused_triton_v2"):
        return unfused(*tensors)
    if not enabled("verify_correctness"):
        return fused(*tensors)
    if transforms_run():
        raise NotImplementedError(
            "ZIGZAG_VERIFY_CORRECTNESS: expected a call outside of the transforms of torch.func (grad, vjp, vmap), got "
            "one inside of them"
        )
    first = tensors[0]
    if not first.is_cuda and fused_backend(first.device) is None:
        warnings.warn(
            "ZIGZAG_VERIFY_CORRECTNESS: without a GPU the fused path is the reference, and so is the unfused one; "
            "TRITON_INTERPRET=1 interprets the kernels",
            stacklevel=3,
        )
    return _Verified.apply(fused, unfused, (tuple(inputs), tuple(results)), *tensors)


def fused_backend(device: torch.device) -> str | None:
    """Return the backend of the fused path: "interpret" on a CPU if TRITON_INTERPRET is set, None otherwise."""
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    return "interpret" if asked and device.type == "cpu" else None


class _Verified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused: Path, unfused: Path, names, *inputs: torch.Tensor):
        ctx.needed = ctx.needs_input_grad[3:]
        recorded = not torch.is_inference_mode_enabled()
        leaves = [x.detach().requires_grad_(grad and recorded) for x, grad in zip(inputs, ctx.needed, strict=True)]
        with torch.set_grad_enabled(recorded):
            ours, theirs = fused(*leaves), unfused(*leaves)
        with torch.no_grad():
            moved = unfused(*map(_moved, leaves))
        for name, *results in zip(names[1], ours, theirs, moved, strict=True):
            _compare(name, Compared(*(x.detach() for x in results)), name.startswith("lse"), 0.0)
        ctx.leaves, ctx.paths, ctx.unfused, ctx.names = leaves, (ours, theirs), unfused, names
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in ours)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *cotangents):
        def gradients(results, leaves, change):
            used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
            return torch.autograd.grad(
                [results[i] for i in used],
                [x for x, needed in zip(leaves, ctx.needed, strict=True) if needed],
                [change(cotangents[i]) for i in used],
                retain_graph=True,
                materialize_grads=True,
            )

        ours, theirs = (gradients(results, ctx.leaves, lambda x: x) for results in ctx.paths)
        with torch.enable_grad():
            leaves = [_moved(x.detach()).requires_grad_(x.requires_grad) for x in ctx.leaves]
            moved = gradients(ctx.unfused(*leaves), leaves, _moved)
        needed = [(name, x) for name, x in zip(ctx.names[0], ctx.leaves, strict=True) if x.requires_grad]
        # <gradient, input> has the size of <cotangent, result>, however much the terms of the gradient cancel.
        loss = sum(_size(x) * _size(y) for x, y in zip(cotangents, ctx.paths[1], strict=True) if x is not None)
        for (name, leaf), *results in zip(needed, ours, theirs, moved, strict=True):
            size = loss / max(_size(leaf), torch.finfo(torch.float32).tiny)
            _compare(f"the gradient of {name}", Compared(*results), False, size)
        in_order = iter(ours)
        return None, None, None, *(next(in_order) if wanted else None for wanted in ctx.needed)


class Compared(NamedTuple):
    """One result of the fused path, of the unfused path, and of the unfused path with moved inputs."""

    fused: torch.Tensor
    unfused: torch.Tensor
    moved: torch.Tensor


def _moved(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with every element moved by up to one rounding of its dtype; equal calls return equal results."""
    generator = torch.Generator(x.device).manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, device=x.device).mul_(2).sub_(1)
    return (x.float() * (1 + torch.finfo(x.dtype).eps * noise)).to(x.dtype)


def _size(x: torch.Tensor) -> float:
    """Return the norm of the finite elements of `x`."""
    return torch.nan_to_num(x.detach().float(), 0.0, 0.0, 0.0).norm().item()


def _compare(name: str, results: Compared, is_lse: bool, size: float) -> None:
    """Raise `AssertionError` if the fused and the unfused result differ by more than `_allowed`."""
    where = f"ZIGZAG_VERIFY_CORRECTNESS: {name} of the fused and the unfused path differ"
    ours, theirs, _ = results
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise AssertionError(f"{where}: {tuple(ours.shape)} {ours.dtype} against {tuple(theirs.shape)} {theirs.dtype}")
    if not ours.numel():
        return
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    odd = ~(ours.isfinite() & theirs.isfinite())
    if (odd & ~same).any():
        raise AssertionError(f"{where}: {(odd & ~same).sum().item()} elements are infinite or NaN in one of them alone")
    ours, theirs, moved = (x.float().masked_fill(odd | ~x.isfinite(), 0.0) for x in results)
    norms = _norms(theirs, is_lse)
    difference, allowed = _norms(ours - theirs, is_lse), _allowed(results.unfused, norms, theirs, moved, is_lse, size)
    worst = (difference / allowed).argmax()
    if difference.flatten()[worst] > allowed.flatten()[worst]:
        of_block, at_most, norm = (x.flatten()[worst].item() for x in (difference, allowed, norms))
        raise AssertionError(
            f"{where}: by {_size(ours - theirs) / max(_size(theirs), 1e-37):.1e} of its norm; where it is worst, in "
            f"{BLOCK} rows of a head with norm {norm:.1e}, by {of_block:.1e}, expected at most {at_most:.1e}"
        )


def _allowed(result: torch.Tensor, norms, theirs, moved, is_lse: bool, size: float) -> torch.Tensor:
    """Return the largest allowed norm of the difference, for each block.

    The limit is a sum. Its terms are `CHANGES` times the change that one rounding of the inputs causes in the block,
    one rounding of the result, and the smallest number of the dtype. The last term is the rounding error of float32
    sums, for a result or a gradient of this `size`.
    """
    info, float32 = torch.finfo(result.dtype), torch.finfo(torch.float32)
    rows = theirs.shape[-1 if is_lse else -3] if theirs.ndim > 2 or is_lse else theirs.shape[0]
    elements = result.numel() / norms.numel()
    sums = ROUNDINGS * float32.eps * rows**0.5
    # Rounding errors of lse are relative to the sum of exponentials, not to its logarithm.
    scale = norms + (elements**0.5 if is_lse else size / norms.numel() ** 0.5)
    rounding = info.eps * norms + info.tiny * info.eps * elements**0.5
    return (CHANGES * _norms(theirs - moved, is_lse) + rounding + sums * scale).clamp(min=float32.tiny)


def _norms(x: torch.Tensor, is_lse: bool) -> torch.Tensor:
    """Return the norms of blocks of rows of `x`: lse `[..., heads, rows]`, or `[..., rows, heads, head_dim]`."""
    squares = x.square() if is_lse else x.square().sum(-1).transpose(-1, -2)
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[-1] % BLOCK))
    return squares.unflatten(-1, (-1, BLOCK)).sum(-1).sqrt()
