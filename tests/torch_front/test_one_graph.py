"""A captured step serves every batch of a plan size: kernels read nothing of a batch but its rows and its tables."""

import dataclasses

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist

import zigzag_torch
from tests.support.hopper import PAIR, assert_kernels_for_hopper, hopper_head_dim
from tests.support.machine import GPU
from tests.support.planners import RememberingPlanner
from tests.support.processes import run_ranks
from zigzag_kernels import plan

DEVICE, KERNELS, DTYPE, HEAD_DIM, SCALE = (
    ("cuda", "triton", torch.bfloat16, hopper_head_dim(64), 8) if GPU else ("cpu", "interpret", torch.float32, 16, 1)
)
TOKENS, SPLIT_TOKENS = 48 * SCALE, 20 * SCALE  # rows of a rank, and its rows of split documents
BATCHES = 50 if GPU else 2
WAYS = (("allgather", {}), ("ring", {}), ("halo", {"window_size": (1, 0)}))  # a chunk has one token or more


def batches(rank, world_size):
    """Yield the rows of `rank` in batches of one size, on the device."""
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        lengths = rng.integers(1, 22, rng.integers(1, 3 if world_size == 1 else 5))
        documents = [np.ones(SCALE * length - length % SCALE, np.int64) for length in lengths]
        sizes = {"tokens": TOKENS, "split_tokens": 0 if world_size == 1 else SPLIT_TOKENS, "max_documents": 5}
        yield zigzag_torch.shard_documents(documents, rank, world_size, **sizes).to(DEVICE)


def arrays(rank):
    """Return (q, k, v) that take gradients, and dout."""
    generator = torch.Generator().manual_seed(rank)
    made = [torch.randn(TOKENS, heads, HEAD_DIM, generator=generator).to(DEVICE, DTYPE) for heads in (4, 2, 2, 4)]
    return [x.requires_grad_() for x in made[:3]], made[3]


def step(leaves, dout, batch, options):
    out = zigzag_torch.zigzag_attention(*leaves, batch, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def captured(call):
    """Return (replay, results): a CUDA graph of `call`, or on a CPU a replay that calls it anew."""
    if not GPU:
        results = [torch.empty_like(x) for x in call()]
        return lambda: [ours.copy_(x) for ours, x in zip(results, call(), strict=True)], results
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph.replay, results


def check_replays(rank, world_size, way, **common):
    method, window = way
    (leaves, dout), replay, seen, options = arrays(rank), None, set(), common | window | {"method": method}
    for made in batches(rank, world_size):
        batch = made.prepare(**common, method=method, **window)
        if replay is None:
            static = dataclasses.replace(batch, segments=batch.segments.clone(), sequences=batch.sequences.clone())
            replay, results = captured(lambda static=static: step(leaves, dout, static, options))
        static.segments.copy_(batch.segments)
        static.sequences.copy_(batch.sequences)
        for x in (*leaves, dout):
            x.detach().copy_(x.detach().roll(1, 0))
        replay()
        wanted = step(leaves, dout, batch, options)
        assert all(map(torch.equal, results, wanted)), (method, made.cu_seqlens)
        assert results[0].isfinite().all()
        seen.add(tuple(batch.segments.flatten().tolist()))
    assert len(seen) > BATCHES // 2  # other documents, not the same ones again


def check_replays_between_ranks(rank, world_size):
    for way in WAYS:
        check_replays(rank, world_size, way, group=dist.group.WORLD, backend=KERNELS)


def test_one_rank_replays_its_step_for_other_batches():
    with plan.use_planner(RememberingPlanner()) as planner:
        check_replays(0, 1, WAYS[0], backend=KERNELS)
    assert_kernels_for_hopper(planner, PAIR)


@pytest.mark.slow
@pytest.mark.multigpu
def test_ranks_replay_their_step_for_other_batches(tmp_path):
    run_ranks(2, tmp_path, check_replays_between_ranks, backend="nccl" if GPU else "gloo")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler, when it is imported
def test_compiled_kernels_are_one_graph_for_all_batches_of_a_size():
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    leaves, dout = arrays(0)

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q, k, v, batch):
        return zigzag_torch.zigzag_attention(q * 2, k, v, batch)

    for made in batches(0, 1):
        batch = made.prepare()
        ours = torch.autograd.grad(attend(*leaves, batch), leaves, dout)
        wanted = torch.autograd.grad(zigzag_torch.zigzag_attention(leaves[0] * 2, *leaves[1:], batch), leaves, dout)
        assert all(map(torch.equal, ours, wanted))
    assert counter.frame_count == 1
