"""One rank of a case in PyTorch, in a process: its tensors, and its results of a call between ranks."""

import torch

from tests.support.machine import GPU
from tests.support.processes import torch_numpy
from tests.support.rank import rank_arrays, rank_rows
from zigzag_torch import zigzag_attention

DEVICE, KERNELS = ("cuda", "triton") if GPU else ("cpu", "interpret")


def on_device(case, inputs, rank):
    """(q, k, v, dout, dlse), sinks and offsets of a rank as tensors."""
    arrays = rank_arrays(case, inputs, rank, key_rows=rank_rows(case, rank))
    tensors = [torch.tensor(x, dtype=getattr(torch, case.dtype), device=DEVICE) for x in arrays[:4]]
    tensors.append(torch.tensor(arrays.dlse, device=DEVICE))
    sinks = torch.tensor(inputs["sinks"], device=DEVICE) if case.sinks else None
    return tensors, sinks, torch.tensor(case.cu_seqlens, dtype=torch.int32, device=DEVICE)


def attend(tensors, sinks, batch, **options):
    """{name: array} of a call between ranks and of its gradients."""
    q, k, v, dout, dlse = tensors
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        leaves.append(sinks.detach().clone().requires_grad_())
        options["sinks"] = leaves[3]
    out, lse, max_logits = zigzag_attention(*leaves[:3], batch, return_lse=True, **options)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    names = ("out", "lse", "max_logits", "dq", "dk", "dv", "dsinks")
    return {name: torch_numpy(x) for name, x in zip(names, (out, lse, max_logits, *gradients), strict=False)}
