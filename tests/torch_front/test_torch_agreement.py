"""Ranks that call differently hear the same error, and none waits for ever."""

import dataclasses
import os
import time

import pytest
import torch
import torch.distributed as dist

import zigzag_torch
from tests.support.commands import finish, start
from tests.support.machine import GPU, HANGS, LATENESS
from tests.support.problems import small_problem
from tests.support.processes import run_ranks
from tests.support.steps import PLENTY
from zigzag_kernels.callspec import CallSpec
from zigzag_torch.parallel import agreement

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
TOKENS, HEADS, KV_HEADS, WORLD_SIZE = 8, 4, 2, 3
CU_SEQLENS = torch.tensor([0, 6, 24], dtype=torch.int32)


def call(rank, odd=None, scale=1.0, **changed):
    """Attention of one rank; the rank `odd` (all, if None) has the `changed` arguments."""
    generator = torch.Generator().manual_seed(rank)
    shapes = {"q": (TOKENS, HEADS, 16), "k": (TOKENS, KV_HEADS, 16), "v": (TOKENS, KV_HEADS, 16)}
    arguments = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    arguments |= {"cu_seqlens": CU_SEQLENS, "group": dist.group.WORLD, "method": "ring", "softmax_scale": scale}
    if odd is None or rank == odd:
        arguments |= changed
    return zigzag_torch.zigzag_attention(**arguments)


def halves(*names):
    """`names` with one dtype less precise than everybody else's."""
    return {name: torch.zeros((TOKENS, HEADS if name == "q" else KV_HEADS, 16), dtype=torch.float16) for name in names}


def longer(*names, rows):
    return {name: torch.zeros(rows, HEADS if name == "q" else KV_HEADS, 16) for name in names}


DIFFERENCES = (
    (longer("q", "k", "v", rows=10), r"k: ranks 0, 2 have .*, rank 1 has \(\(10, 2, 16\), 'float32'\)"),
    (halves("q", "k", "v"), r"v: ranks 0, 2 have .*, rank 1 has \(\(8, 2, 16\), 'float16'\)"),
    ({"causal": False}, "causal: ranks 0, 2 have True, rank 1 has False$"),
    ({"softmax_scale": 0.5}, "softmax_scale: ranks 0, 2 have .*, rank 1 has 0.5$"),
    ({"method": "allgather"}, "method: ranks 0, 2 have ring, rank 1 has allgather$"),
    ({"heads_k_stride": 1}, "heads_k_stride: ranks 0, 2 have 2, rank 1 has 1$"),
    ({"backend": "interpret"}, "backend: ranks 0, 2 have reference, rank 1 has interpret$"),
    # Faults that a rank finds itself.
    ({"causal": "yes"}, "^rank 1: causal: expected True or False, got 'yes'$"),
    (longer("k", "v", rows=9), "^rank 1: k: expected the [0-9]+ rows of q"),
    ({"cu_seqlens": None} | longer("q", "k", "v", rows=7), "^rank 1: q: expected an even number .* got 7$"),
)


def check_agreement(rank, world_size):
    good = call(rank)
    for number, (changed, message) in enumerate(DIFFERENCES, start=2):
        with pytest.raises(ValueError, match=message):
            call(rank, odd=1, scale=float(number), **changed)  # a scale that they have not agreed upon
    with pytest.raises(ValueError, match=r"^causal: expected True or False, got 'yes'$"):
        call(rank, causal="yes")  # the same fault on all ranks reads as on one device
    assert torch.equal(call(rank), good)  # the ranks are still in step

    check_equal_lengths(rank)
    check_lengths(rank, world_size)
    check_groups(rank)
    check_absence(rank)


def check_equal_lengths(rank):
    """Without `cu_seqlens` their number follows from the shape of q, which the host knows."""
    q, k, v = (torch.randn(TOKENS, heads, 16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    batched = [x.unflatten(0, (2, TOKENS // 2)) for x in (q, k, v)]
    for backend in ("reference", "interpret"):
        options = {"group": dist.group.WORLD, "backend": backend}
        with pytest.raises(ValueError, match=r"sequences: ranks 0, 2 have 1, rank 1 has 2$"):
            zigzag_torch.zigzag_attention(*(batched if rank == 1 else (q, k, v)), **options)
        zigzag_torch.zigzag_attention(*batched, **options)


def check_lengths(rank, world_size):
    """The host does not look at the lengths, the device does; `validate` does on request."""
    for method in ("allgather", "ring"):
        other = torch.tensor([0, 12, 24], dtype=torch.int32)
        tensors = [torch.randn(TOKENS, heads, 16, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        mine = other if rank == 2 else CU_SEQLENS
        for backend in ("interpret", "reference"):
            options = {"group": dist.group.WORLD, "method": method, "backend": backend}
            batch = zigzag_torch.prepare_batch(mine, **options)
            for argument in (mine, batch, zigzag_torch.prepare_batch(mine, rank, world_size, method=method)):
                if argument is not batch and backend == "interpret":
                    continue
                out, lse = zigzag_torch.zigzag_attention(*tensors, argument, return_lse=True, **options)
                for x in (out, lse, *torch.autograd.grad(out.sum() + lse.sum(), tensors)):
                    assert x.isnan().all(), (rank, options)
    zigzag_torch.validate(CU_SEQLENS, world_size, total=24, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"cu_seqlens\[1\]: ranks 0, 1 have 6, rank 2 has 12$"):
        zigzag_torch.validate(mine, world_size, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"^rank 2: world_size: expected the size of the group, 3, got 4$"):
        zigzag_torch.validate(CU_SEQLENS, 4 if rank == 2 else world_size, group=dist.group.WORLD)
    ring = zigzag_torch.prepare_batch(CU_SEQLENS, group=dist.group.WORLD, method="ring")
    with pytest.raises(ValueError, match=r"^rank 0: method: expected that of the prepared batch, 'ring', got 'allg"):
        call(rank, cu_seqlens=ring, method="allgather" if rank == 0 else "ring", scale=20.0)
    with pytest.raises(ValueError, match="rank: expected None or that in the group, "):
        zigzag_torch.prepare_batch(CU_SEQLENS, rank + 1, group=dist.group.WORLD)


def check_groups(rank):
    pair = dist.new_group([0, 1])
    if rank == 2:
        with pytest.raises(ValueError, match=r"group: expected .* that this process is in, .* got int -100"):
            call(rank, group=pair)
    else:
        call(rank, group=pair, cu_seqlens=torch.tensor([0, 16], dtype=torch.int32))


def check_absence(rank):
    """Nobody waits for a rank that does not come: not in the agreement, nor, when the process is gone, for its data."""
    os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(LATENESS)  # of rank 2 after rank 0
    group = dist.new_group([0, 1, 2])
    if rank != 1:
        with pytest.raises(RuntimeError, match=rf"^rank 1 did not make this call within {LATENESS:g} s"):
            call(rank, group=group)
    last = dist.new_group([0, 1, 2])
    os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(PLENTY)
    call(rank, group=last)
    if rank == 1:
        os._exit(0)  # as if it had crashed
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^this call is over on rank 1: .* the process ended"):
        call(rank, group=last)
    assert time.monotonic() - started < HANGS / 2
    os._exit(0)  # what is left of the group cannot be taken down together


def test_ranks_agree_on_every_option(monkeypatch):
    """But not on how each of them repeats its own kernels, as only deterministic ones serve between ranks, nor on the
    number of documents that a rank has whole, which no message depends on."""
    facts = {}
    monkeypatch.setattr(agreement, "agree", lambda _, pairs, _digest: facts.update(pairs))
    agreement.agree_on_call(None, small_problem())
    names = {field.name.removeprefix("has_") for field in dataclasses.fields(CallSpec)}
    assert names - facts.keys() == {"deterministic", "whole_documents"}


def test_ranks_agree_before_data_moves(tmp_path):
    run_ranks(WORLD_SIZE, tmp_path, check_agreement)


def test_a_rank_that_fails_ends_the_others():
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    (ended,) = finish(start(*torchrun, "-m", "tests.programs.failing_torch_rank"))
    assert ended.code != 0
    assert "OSError: out of disk" in ended.errors
