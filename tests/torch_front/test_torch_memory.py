"""What a rank of an all-gather or a ring allocates, counted at the allocator, with transfers and kernels left out."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.support.machine import GPU
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import segment_table_shapes
from zigzag_torch import launch
from zigzag_torch.parallel import Residuals, Tables, allgather, ring, transport_of

WORLD_SIZE, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 8, 256, 16, 8, 64
DTYPE, FLOAT32 = 2, 4  # bytes; inputs are bfloat16


@pytest.fixture
def alone(monkeypatch):
    """One rank of `WORLD_SIZE` that hears nothing from the others and computes nothing, but allocates all it would."""
    nothing = SimpleNamespace(wait=lambda: None)

    def run(launched, first, *others):
        arrays = dict(zip(launched.inputs, (first, *others), strict=True))
        given = (arrays.get(launched.in_place.get(output.name)) for output in launched.outputs)
        return tuple(
            launch.allocate(output, first) if x is None else x
            for output, x in zip(launched.outputs, given, strict=True)
        )

    monkeypatch.setattr(launch, "run", run)
    for module in (allgather, ring):
        monkeypatch.setattr(module, "resolve", lambda _: SimpleNamespace(size=lambda: WORLD_SIZE, rank=lambda: 0))
        monkeypatch.setattr(module, "agree_on_call", lambda *_, **__: None)
    for name in ("gather_into", "reduce_into"):
        monkeypatch.setattr(allgather, name, lambda *_, **__: nothing)
    monkeypatch.setattr(ring, "exchange", lambda *_, **__: [nothing])
    monkeypatch.setattr(ring, "wait", lambda *_: None)


def peak(function, *arguments):
    """Bytes that a call has allocated and not yet freed, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = function(*arguments)
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = highest = 0
    for change in changes:
        allocated += change
        highest = max(highest, allocated)
    assert allocated == sum(
        x.untyped_storage().nbytes() for x in results if x is not None
    )  # what is left is what is returned
    return highest


@pytest.mark.skipif(GPU, reason="counts what a CPU allocates")
@pytest.mark.parametrize(("method", "stride"), [("allgather", 1), ("allgather", 2), ("allgather", 8), ("ring", 8)])
def test_memory_of_one_call(alone, method, stride):
    q, k, v = (torch.zeros(TOKENS, heads, HEAD_DIM, dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    steps = WORLD_SIZE if method == "ring" else 1
    tables = Tables(*(torch.zeros(shape, dtype=torch.int32) for shape in segment_table_shapes(1, steps)))
    call = make_call_spec(head_dim=HEAD_DIM, backend="interpret", method=method, heads_k_stride=stride)
    transport = transport_of(q, k, v, call, 1, WORLD_SIZE, KVLayout.PEER, "group")
    out, lse = torch.zeros_like(q), torch.zeros(HEADS, TOKENS)

    # The sizes of docs/reference/methods.md, in bytes.
    window = TOKENS * 2 * stride * HEAD_DIM  # elements of K and V of one rank
    statistics = 2 * TOKENS * HEADS * FLOAT32  # of all windows
    outputs, gradients = q.numel() * DTYPE + lse.numel() * FLOAT32, (q.numel() + 2 * k.numel()) * DTYPE
    if method == "allgather":
        buffers = (2 if stride < KV_HEADS else 1) * WORLD_SIZE * window * DTYPE
        forward = buffers + outputs
        backward = buffers + WORLD_SIZE * window * FLOAT32 + gradients
    else:
        buffers = 2 * window * DTYPE
        forward = buffers + q.numel() * FLOAT32 + outputs
        backward = buffers + 2 * window * FLOAT32 + q.numel() * FLOAT32 + statistics + gradients
    assert peak(transport.forward, q, k, v, tables) <= forward
    assert peak(transport.backward, Residuals(q, k, v, out, lse), q, None, tables) <= backward
