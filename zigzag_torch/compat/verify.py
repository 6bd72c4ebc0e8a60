"""Chooses between the fused and the unfused path by flag, and compares the two."""

from collections.abc import Callable

import torch

from .flags import enabled

TOLERANCE = 1e-2  # absolute and relative: 16-bit results of two orders of summation differ by less

Path = Callable[..., tuple[torch.Tensor, ...]]


def choose_path(fused: Path, unfused: Path, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `fused(*inputs)` or `unfused(*inputs)`, or compare both and return the first, as the flags say.

    The comparison covers the backward pass too, and raises `AssertionError` with the largest difference.
    """
    if not enabled("use_fused_triton_v2"):
        return unfused(*inputs)
    if enabled("verify_correctness"):
        return _Verified.apply(fused, unfused, *inputs)
    return fused(*inputs)


class _Verified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused: Path, unfused: Path, *inputs: torch.Tensor):
        needed = ctx.needs_input_grad[2:]
        recorded = not torch.is_inference_mode_enabled()
        leaves = [x.detach().requires_grad_(grad and recorded) for x, grad in zip(inputs, needed, strict=True)]
        with torch.set_grad_enabled(recorded):
            ours, theirs = fused(*leaves), unfused(*leaves)
        _compare("results", ours, theirs)
        ctx.graphs = [x for x in leaves if x.requires_grad], ours, theirs
        ctx.needed = needed
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in ours)

    @staticmethod
    def backward(ctx, *cotangents):
        leaves, *paths = ctx.graphs
        used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        ours, theirs = (
            torch.autograd.grad(
                [results[i] for i in used],
                leaves,
                [cotangents[i] for i in used],
                retain_graph=True,
                materialize_grads=True,
            )
            for results in paths
        )
        _compare("gradients", ours, theirs)
        gradients = iter(ours)
        return None, None, *(next(gradients) if needed else None for needed in ctx.needed)


def _compare(what: str, ours: tuple, theirs: tuple) -> None:
    """Raise `AssertionError` unless the tensors are close to each other."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        where = f"ZIGZAG_VERIFY_CORRECTNESS: {what}[{i}] of the fused and the unfused path differ"
        a, b = (x.detach().float() for x in (a, b))
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, where=where: f"{where}\n{m}")
