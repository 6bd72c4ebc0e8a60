"""What a step must not do, in any of the public calls: make the host wait, or compute differently in a CUDA graph."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zigzag_torch
from tests.support import pieces
from tests.support.hopper import FUSED, PAIR, assert_kernels_for_hopper, hopper_head_dim, needs_hopper
from tests.support.machine import GPU
from tests.support.pieces import DEVICE, tensor
from tests.support.planners import RememberingPlanner
from zigzag_kernels import plan
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_torch import prepare_batch, zigzag_attention, zigzag_attention_gathered

TOKENS, WORLD_SIZE, RANK = 28, 2, 1
CU_SEQLENS = [0, 12, 12, 52]  # of both ranks; 2 rows of each are padding
HEAD_DIM, DTYPE = (hopper_head_dim(64), torch.bfloat16) if GPU else (16, torch.float32)
CHUNKS = RANK, 2 * WORLD_SIZE - 1 - RANK
NAMES = (
    "zigzag_attention", "without lengths", "gathered", "prepare_batch", "ranges", "packed rows", "varlen", "kvpacked",
    "grouped", "pair",
)  # fmt: skip
# Calls whose backward pass takes one kernel, if these variables are set.
IN_ONE_KERNEL = {"in any order": HOPPER.variable, "in turns": rules.TURNS}


@pytest.fixture(scope="module", params=[*NAMES, *(pytest.param(name, marks=needs_hopper) for name in IN_ONE_KERNEL)])
def name(request):
    """A name of `calls`; both tests of a call follow one another, so that a worker compiles its kernels once."""
    return request.param


@pytest.fixture(autouse=True)
def _kernels(name, monkeypatch):
    """On a Hopper GPU, the call takes kernels for Hopper alone, as the calls of a model do."""
    if name in IN_ONE_KERNEL:
        monkeypatch.setenv(IN_ONE_KERNEL[name], "1")
    with plan.use_planner(RememberingPlanner()) as planner:
        yield
    assert_kernels_for_hopper(planner, FUSED if name in IN_ONE_KERNEL else PAIR)


def arrays():
    """q, k, v of all ranks, and dout."""
    rows = {"q": (TOKENS, 4), "k": (WORLD_SIZE * TOKENS, 2), "v": (WORLD_SIZE * TOKENS, 2), "dout": (TOKENS, 4)}
    return [torch.randn(*shape, HEAD_DIM, device=DEVICE, dtype=DTYPE) for shape in rows.values()]


def calls():
    """{name: out of q, k, v as from `arrays`}; what a model has ready before the step is made here."""
    cu_seqlens, rank = tensor(CU_SEQLENS, "int32"), tensor([RANK], "int32")
    local, real, sinks = cu_seqlens // WORLD_SIZE, tensor([4, 0, 20], "int32"), tensor([0.5, -1.0, 2.0, float("-inf")])
    q, kv, *_ = arrays()  # of which only the shapes are used here
    grouped = pieces.grouped_arguments(q, kv, cu_seqlens, RANK, WORLD_SIZE, True)
    grouped = pieces.fused_arguments(grouped, RANK)
    rows, offsets = grouped["chunk_indices_list"], grouped["chunk_cu_seqlens_q_list"]
    lengths = local, local, TOKENS, TOKENS, 1, slice(0, TOKENS)

    def own(q, k, v):
        return q, k[:TOKENS], v[:TOKENS]

    def in_groups(q, k, v):
        chunks = {"chunk_q_list": [q[x] for x in rows], "kv_buffer": torch.stack([k, v])}
        return zigzag_torch.replace_grouped_attention_with_fused_triton_v2(**grouped | chunks)[0]

    def as_pair(q, k, v):
        every = q[rows[0]], q[rows[1]], k, v, *offsets, cu_seqlens, *CHUNKS, 2 * WORLD_SIZE
        return torch.cat(zigzag_torch.fused_zigzag_llama3_flash_attn_forward_v2(*every)[:2])

    def prepared(q, k, v):
        return zigzag_attention_gathered(q, k, v, prepare_batch(cu_seqlens, rank, WORLD_SIZE), RANK, WORLD_SIZE)

    def gathered(*qkv, **options):
        return zigzag_attention_gathered(*qkv, cu_seqlens, rank, WORLD_SIZE, **options)

    def ranged(q, k, v):
        batch = prepare_batch(local, lengths=real)
        options = {"window_size": (5, -1), "attention_chunk": 9, "softcap": 2.0, "sinks": sinks}
        return zigzag_attention(*own(q, k, v), batch, return_max_logits=True, **options)[0]

    def kvpacked(q, k, v):
        kv = torch.stack(own(q, k, v)[1:], 1)
        return zigzag_torch.zigzag_llama3_flash_attn_varlen_kvpacked_func(q, kv, *lengths, causal=True)

    return {
        "zigzag_attention": lambda *qkv: zigzag_attention(*own(*qkv), local),
        "without lengths": lambda *qkv: zigzag_attention(*own(*qkv)),
        "gathered": gathered,
        "in any order": lambda *qkv: gathered(*qkv, deterministic=False),
        "in turns": gathered,
        "prepare_batch": prepared,
        "ranges": ranged,
        "packed rows": lambda *qkv: gathered(*qkv, layout="row"),
        "varlen": lambda *qkv: zigzag_torch.zigzag_llama3_flash_attn_varlen_func(*own(*qkv), *lengths, causal=True),
        "kvpacked": kvpacked,
        "grouped": in_groups,
        "pair": as_pair,
    }


def step(call, leaves, dout):
    """out and the gradients of `leaves`."""
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout[: len(out)])


class Unread(TorchDispatchMode):
    """On a CPU nothing waits, but what would wait on a GPU is seen: that the host asks for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"the host waits for a value: {func}")
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def waiting_is_an_error():
    if not GPU:
        with Unread():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device(name, kernel_backend):
    with pieces.kernels(kernel_backend):
        call, (*leaves, dout) = calls()[name], arrays()
        leaves = [x.requires_grad_() for x in leaves]
        if GPU:
            step(call, leaves, dout)  # compiles, which does wait
        with waiting_is_an_error():
            step(call, leaves, dout)
            with pytest.raises(RuntimeError, match=r"wait|synchron"):
                dout.sum().item()


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward(name):
    """On new data in the arrays that it was captured with: bit for bit what an eager step gives.

    Only dQ, if its sums are added in any order, is rounded otherwise.
    """
    call, (*leaves, dout) = calls()[name], arrays()
    leaves = [x.requires_grad_() for x in leaves]
    with torch.cuda.stream(torch.cuda.Stream()):
        step(call, leaves, dout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, leaves, dout)
    for _ in range(2):
        with torch.no_grad():
            for x, new in zip((*leaves, dout), arrays(), strict=True):
                x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        for i, (ours, theirs) in enumerate(zip(captured, step(call, leaves, dout), strict=True)):
            if name == "in any order" and i == 1:
                torch.testing.assert_close(ours, theirs)
            else:
                assert torch.equal(ours, theirs)
