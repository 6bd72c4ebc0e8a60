"""Attention to plans of documents in PyTorch, whole documents and split ones in one call, against the oracle."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist

import zigzag_torch
from tests.support import plan_cases
from tests.support.machine import GPU
from tests.support.plan_cases import CASES, assert_rank_is_right
from tests.support.processes import run_ranks, torch_numpy
from zigzag_kernels import cost
from zigzag_torch.parallel import collectives
from zigzag_torch.plans import Parts

DEVICE, KERNELS = ("cuda", "triton") if GPU else ("cpu", "interpret")
NAMES = "out", "lse", "max_logits", "dq", "dk", "dv", "dsinks"
pytestmark = pytest.mark.multigpu


def local_arrays(case, rank):
    return {name: torch.tensor(x, device=DEVICE) for name, x in plan_cases.rank_arrays(case, rank).items()}


def attend(case, rank, batch, **options):
    """{name: tensor} of NAMES; dsinks is the sum over ranks, and missing without sinks."""
    arrays = local_arrays(case, rank)
    leaves = [arrays[name].requires_grad_() for name in ("q", "k", "v", *(["sinks"] if case.sinks else []))]
    sinks = leaves[3] if case.sinks else None
    results = zigzag_torch.zigzag_attention(
        *leaves[:3], batch, sinks=sinks, return_lse=True, return_max_logits=True, **case.options, **options
    )
    gradients = torch.autograd.grad(results[:2], leaves, [arrays["dout"], arrays["dlse"]])
    if case.sinks:
        dist.all_reduce(gradients[3])
    return dict(zip(NAMES, (*results, *gradients), strict=False))


def check_cases(rank, world_size, cases):
    group = dist.group.WORLD
    for case in cases:
        for method in case.methods:
            for backend in (KERNELS, "reference") if method == case.methods[0] else (KERNELS,):
                common = {"group": group, "method": method, "backend": backend}
                batch = zigzag_torch.prepare_batch(case.plan, device=DEVICE, **common, **case.reach)
                stride = {"heads_k_stride": 1} if method == "allgather" else {}
                results = {name: torch_numpy(x) for name, x in attend(case, rank, batch, **common, **stride).items()}
                assert_rank_is_right(f"{case}, {method}, {backend}, rank {rank}", case, rank, results)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
def test_both_parts_in_one_call_match_the_oracle_of_the_whole_batch(world_size, tmp_path):
    cases = [case for case in CASES if case.world_size == world_size]
    run_ranks(world_size, tmp_path, check_cases, cases, backend="nccl" if GPU else "gloo")


@pytest.mark.slow
def test_ranks_compile_once(tmp_path):
    run_ranks(2, tmp_path, check_one_graph, backend="nccl" if GPU else "gloo")


def test_ranks_move_split_rows_alone_and_refuse_other_plans(tmp_path):
    run_ranks(2, tmp_path, check_rest, backend="nccl" if GPU else "gloo")


def check_rest(rank, world_size):
    check_moved_rows(rank)
    check_broken_plans(rank)


def check_one_graph(rank, world_size):
    """Fifty batches of one size are one graph for each backend, which gives the bits of eager calls."""
    generator, rng = torch.Generator().manual_seed(rank), np.random.default_rng(0)
    leaves = [torch.randn(48, heads, 16, generator=generator).to(DEVICE).requires_grad_() for heads in (4, 2, 2)]
    for backend, count in ((KERNELS, 3), ("reference", 50)):
        common = {"group": dist.group.WORLD, "backend": backend}
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        def loss(q, k, v, batch, common=common):
            out, lse = zigzag_torch.zigzag_attention(q, k, v, batch, return_lse=True, **common)
            return (out * out.detach().cos()).sum() + lse.clamp(min=-9).sum()

        compiled = torch.compile(loss, backend=counter, fullgraph=True)
        for number in range(count):
            documents = [np.ones(rng.integers(1, 22), np.int64) for _ in range(rng.integers(1, 5))]
            made = zigzag_torch.shard_documents(documents, rank, 2, tokens=48, split_tokens=20, max_documents=5)
            batch = made.to(DEVICE).prepare(**common)
            traced = torch.autograd.grad(compiled(*leaves, batch), leaves)
            if number < 3:
                assert all(map(torch.equal, traced, torch.autograd.grad(loss(*leaves, batch), leaves)))
        assert counter.frame_count == 1


def check_moved_rows(rank):
    """Only the rows of split documents move, as many bytes as the cost model counts, and none if there are none."""
    moved, received, send = [], [], dist.batch_isend_irecv

    def spy(function, output, x, group):
        moved.append((len(output), len(x)))
        received.append(abs(output.nbytes - x.nbytes))
        return function(output, x, group)

    def spy_on_messages(operations):
        received.extend(x.tensor.nbytes for x in operations if x.op is dist.irecv)
        return send(operations)

    from zigzag_torch.parallel import allgather

    originals = {name: getattr(collectives, name) for name in ("gather_into", "reduce_into")}
    for name, function in originals.items():
        setattr(allgather, name, functools.partial(spy, function))
    dist.batch_isend_irecv = spy_on_messages
    sizes = {"heads": plan_cases.HEADS, "kv_heads": plan_cases.KV_HEADS, "head_dim": plan_cases.HEAD_DIM}
    try:
        for case in (case for case in CASES if case.name in ("w2", "w2-window", "w2-whole-only")):
            for method in case.methods:
                common = {"group": dist.group.WORLD, "method": method, "backend": KERNELS}
                batch = zigzag_torch.prepare_batch(case.plan, device=DEVICE, **common, **case.reach)
                received.clear()
                attend(case, rank, batch, heads_k_stride=2 if method == "allgather" else None, **common)
                step = case.plan.step(method=method, dtype="float32", **sizes, **case.reach)
                passes = (direction(step, rank) for direction in (cost.forward, cost.backward))
                assert sum(received) == sum(x.moved_bytes for x in passes), (case, method)
    finally:
        dist.batch_isend_irecv = send
        for name, function in originals.items():
            setattr(allgather, name, function)
    rows = next(case for case in CASES if case.name == "w2").split_tokens
    assert moved[:4] == [*[(2 * rows, rows)] * 2, *[(rows, 2 * rows)] * 2]  # K/V in both passes, then dK and dV


def check_broken_plans(rank):
    """A fault of one rank alone makes NaN on all; what hosts know raises on all."""
    case = next(case for case in CASES if case.name == "w2")
    group, plan = dist.group.WORLD, case.plan
    for backend in (KERNELS, "reference"):
        common = {"group": group, "backend": backend}
        good = Parts.of_plan(plan, rank, DEVICE)
        offsets = torch.tensor([0, 9, 27, 27], dtype=torch.int32, device=DEVICE)  # of 26 rows
        too_long = good._replace(whole_cu_seqlens=offsets) if rank == 1 else good
        other = dataclasses.replace(plan, lengths=(32, *plan.lengths[1:])) if rank == 1 else plan
        swapped = dataclasses.replace(plan, whole=plan.whole[::-1]) if rank == 1 else plan
        for broken in (too_long, Parts.of_plan(other, rank, DEVICE), swapped):
            results = attend(case, rank, zigzag_torch.prepare_batch(broken, device=DEVICE, **common), **common)
            assert all(x.isnan().all() for x in results.values())
        unequal = torch.tensor([rank])  # tokens of another batch
        batch = zigzag_torch.prepare_batch(good, unsharded=unequal.to(DEVICE), **common)
        assert attend(case, rank, batch, **common)["out"].isnan().all()
    wider = dataclasses.replace(plan, split_tokens=plan.split_tokens + 2 * rank)
    with pytest.raises(ValueError, match="layout: rank 0 has document, 46 rows, 26 of them for whole documents"):
        zigzag_torch.prepare_batch(wider, **common)
    batch = zigzag_torch.prepare_batch(good, **common)
    arrays = local_arrays(case, rank)
    with pytest.raises(ValueError, match="q: expected the 46 rows that a rank has in the plan, got 44"):
        zigzag_torch.zigzag_attention(*(arrays[name][:44] for name in "qkv"), batch, **common)
    unprepared = dataclasses.replace(batch, compared_by=None)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected a batch .* prepared with this group"):
        zigzag_torch.zigzag_attention(*(arrays[name] for name in "qkv"), unprepared, **common)


def test_a_plan_on_one_rank_is_one_part():
    """Whole and split documents of one rank, with padding between them."""
    case = dataclasses.replace(CASES[0], whole=((9, 14),), split=(33,), split_tokens=36)
    arrays = plan_cases.rank_arrays(case, 0)
    batch = zigzag_torch.prepare_batch(case.plan)
    out = zigzag_torch.zigzag_attention(*(torch.tensor(arrays[name]) for name in "qkv"), batch)
    assert_rank_is_right("one rank", case, 0, {"out": torch_numpy(out)})
    with pytest.raises(ValueError, match="q: expected the 62 rows that a rank has in the plan, got 61"):
        zigzag_torch.zigzag_attention(*(torch.tensor(arrays[name][:61]) for name in "qkv"), batch)
    alone = zigzag_torch.prepare_batch(dataclasses.replace(case, split=(), split_tokens=0).plan)
    assert alone.lengths is None


def test_a_plan_takes_no_other_lengths_layout_ranks_or_missing_group():
    plan = CASES[0].plan
    for options, message in (
        ({"rank": 0, "lengths": [3]}, r"lengths: expected None with a plan, got \[3\]"),
        ({"rank": 0, "layout": "row"}, "layout: expected document with a plan, got 'row'"),
        ({"rank": 0, "world_size": 3}, "world_size: expected that of the plan, 2, got 3"),
        ({"rank": 0, "world_size": 2}, "group: expected that of the ranks of a plan .*, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            zigzag_torch.prepare_batch(plan, **options)
    parts = Parts.of_plan(plan, 0)
    with pytest.raises(ValueError, match="whole_tokens: expected a number of the 46 rows, got 47"):
        zigzag_torch.prepare_batch(parts._replace(whole_tokens=47), 0, 2)
    with pytest.raises(ValueError, match="whole_cu_seqlens: expected dtype int32, got int64"):
        zigzag_torch.prepare_batch(parts._replace(whole_cu_seqlens=parts.whole_cu_seqlens.long()), 0, 2)
    q = torch.zeros(46, 4, 16)
    batch = zigzag_torch.Batch(parts.split_cu_seqlens, torch.tensor([0]), 2, whole_tokens=26, host_rank=0, tokens=46)
    with pytest.raises(ValueError, match="cu_seqlens: expected one part, got a batch of whole and split documents"):
        zigzag_torch.zigzag_attention_gathered(q, torch.zeros(92, 2, 16), torch.zeros(92, 2, 16), batch, 0, 2)


def test_parts_and_a_batch_of_documents_name_limits_that_they_break():
    """Of halos and promised lengths, for which attention is NaN."""
    parts = Parts.of_plan(CASES[0].plan, 0)
    zigzag_torch.validate(parts, 2, halo=9, max_seqlen=33)
    batch = zigzag_torch.shard_documents([list(range(40)), [1, 2]], 0, 2, split_above=0)
    batch.validate(halo=10, max_seqlen=40)
    in_row = zigzag_torch.shard_documents([list(range(40)), [1, 2]], 0, 2, layout="row")
    in_row.validate(max_seqlen=40)
    zigzag_torch.shard_documents([[]], 0, 2, layout="row").validate(halo=3)
    for broken, message in (
        (lambda: zigzag_torch.validate(parts, 2, halo=10), "expected chunks of at least the 10 rows of a halo, got 9"),
        (lambda: zigzag_torch.validate(parts, 2, max_seqlen=32), "max_seqlen: expected at least the 33 tokens"),
        (lambda: zigzag_torch.validate(parts, 2, total=92), "total: expected None with a plan, got 92"),
        (lambda: batch.validate(halo=11), "expected chunks of at least the 11 rows of a halo, got 10"),
        (lambda: batch.validate(max_seqlen=39), "max_seqlen: expected at least the 40 tokens"),
        (lambda: in_row.validate(max_seqlen=39), "max_seqlen: expected at least the 40 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            broken()


def test_operators_of_two_parts_know_their_shapes():
    """What `torch.compile` assumes of the tables is what they are, for both methods."""
    from zigzag_torch.autograd import segment_tables

    for method in ("gathered", "peer"):
        for split_tokens in (20, 0):
            case = dataclasses.replace(CASES[0], split_tokens=split_tokens)
            parts = Parts.of_plan(case.plan, 0)
            inputs = parts.split_cu_seqlens, torch.tensor([0], dtype=torch.int32), 2, method, "interpret"
            inputs += parts.split_lengths, "document", 0, 1, parts.whole_cu_seqlens, parts.whole_tokens, parts.tokens
            with torch._subclasses.FakeTensorMode() as mode:
                fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
                shapes = [x.shape for x in segment_tables.registered(*fake)]
            if not GPU:
                assert shapes == [x.shape for x in segment_tables(*inputs)]
            assert all(np.prod(shape) > 0 for shape in shapes)
