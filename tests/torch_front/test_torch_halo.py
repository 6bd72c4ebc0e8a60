"""Halos between processes, against the float64 oracle of the batch that was dealt out."""

import pytest
import torch
import torch.distributed as dist

from tests.support import oracle
from tests.support.cases import make_inputs
from tests.support.frameworks import call_options, prepare_torch
from tests.support.halos import HALOS, reach_options
from tests.support.machine import GPU, GPUS
from tests.support.processes import run_ranks
from tests.support.rank import assert_results_close, batch_results, rank_rows, rows_of_results
from tests.support.torch_ranks import DEVICE, KERNELS, attend, on_device
from zigzag_kernels import cost
from zigzag_torch import prepare_batch, validate, zigzag_attention

pytestmark = pytest.mark.multigpu
BACKENDS = KERNELS, "reference"
QUICK = "w2-packed", "w2-short", "w2-row"


def check_cases(rank, world_size, expected):
    for case, exact, straightforward in expected:
        inputs = make_inputs(case)
        tensors, sinks, cu_seqlens = on_device(case, inputs, rank)
        common = {"group": dist.group.WORLD, "method": "halo"}
        for backend in BACKENDS:
            batch = prepare_torch(case, cu_seqlens, rank, backend, **common, **reach_options(case))
            results = attend(tensors, sinks, batch, **common, **call_options(case), backend=backend)
            mine = [rows_of_results(x, rank_rows(case, rank)) for x in (exact, straightforward)]
            if case.sinks:  # those of this rank's rows
                mine[0]["dsinks"] = mine[0]["sink_terms"].sum(1)
            assert_results_close(f"rank {rank} of {world_size}, {case}, {backend}", results, *mine)


@pytest.mark.parametrize(
    ("world_size", "quick"),
    [(2, True), *(pytest.param(size, False, marks=pytest.mark.slow) for size in (2, 3, 4))],
)
def test_ranks_match_the_oracle_of_the_whole_batch(world_size, quick, tmp_path):
    if GPU and world_size > len(GPUS):
        pytest.skip(f"needs {world_size} GPUs")
    expected = []
    for case in HALOS:
        if case.world_size == world_size and quick == (case.name in QUICK):
            inputs = make_inputs(case)
            arithmetics = oracle.EXACT, oracle.straightforward(case.dtype)
            expected.append((case, *(batch_results(case, inputs, x) for x in arithmetics)))
    run_ranks(world_size, tmp_path, check_cases, expected, backend="nccl" if GPU else "gloo")


def check_rest(rank, world_size):
    check_moved_rows(rank)
    check_graph()
    check_broken_promises(rank)
    check_disagreements(rank)
    check_choice()


@pytest.mark.slow
def test_ranks_move_halos_alone_compile_and_refuse_what_halos_do_not_serve(tmp_path):
    run_ranks(2, tmp_path, check_rest, backend="nccl" if GPU else "gloo")


def check_moved_rows(rank):
    """One message of K/V to each neighbour in each pass, of no more rows than halos have, and two of gradients."""
    sent, send = [], dist.batch_isend_irecv

    def spy(operations):
        sent.extend(x.tensor.nbytes for x in operations if x.op is dist.isend)
        return send(operations)

    dist.batch_isend_irecv = spy
    try:
        for name, halo_rows in ("w2-packed", 4 * 5), ("w2-all-rows", 12), ("w2-row-batch", 3 * 10):
            case = next(case for case in HALOS if case.name == name)
            tensors, sinks, cu_seqlens = on_device(case, make_inputs(case), rank)
            common = {"group": dist.group.WORLD, "method": "halo", "backend": KERNELS}
            batch = prepare_torch(case, cu_seqlens, rank, common.pop("backend"), **common, **reach_options(case))
            attend(tensors, sinks, batch, **common, **call_options(case), backend=KERNELS)
            row = halo_rows * case.kv_heads * case.head_dim
            assert sent == [2 * row * tensors[0].itemsize] * 2 + [4 * row] * 2, name
            if case.layout == "document":
                names = "lengths", "world_size", "heads", "kv_heads", "head_dim", "dtype", "window_size", "padding"
                step = cost.Step(method="halo", **{name: getattr(case, name) for name in names})
                predicted = [direction(step, rank).moved_bytes for direction in (cost.forward, cost.backward)]
                assert predicted == [sent[0], sum(sent[1:])], name
            sent.clear()
    finally:
        dist.batch_isend_irecv = send


def check_graph():
    """A compiled graph gives the bits of eager calls; without a prepared batch as well."""
    common = {"group": dist.group.WORLD, "method": "halo", "backend": KERNELS}
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(20, heads, 16, generator=generator).to(DEVICE).requires_grad_() for heads in (4, 2, 2)]
    cu_seqlens = torch.tensor([0, 16, 40], dtype=torch.int32, device=DEVICE)

    def loss(q, k, v, prepared=True):
        batch = prepare_batch(cu_seqlens, window_size=(4, 0), **common) if prepared else cu_seqlens
        out, lse = zigzag_attention(q, k, v, batch, window_size=(3, 0), return_lse=True, **common)
        return out.square().sum() + lse.sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), eager))
    # With a window of 3 alone the halo is smaller, and rows are summed in other blocks.
    for x, y in zip(torch.autograd.grad(loss(*leaves, prepared=False), leaves), eager, strict=True):
        torch.testing.assert_close(x, y)


def check_broken_promises(rank):
    """What only a device knows gives NaN on all ranks and a reason by `validate`; what hosts know raises on all."""
    q, k, v = (torch.ones(20, heads, 16, device=DEVICE, requires_grad=True) for heads in (2, 1, 1))
    offsets = torch.tensor([0, 8, 40], dtype=torch.int32, device=DEVICE)
    packed = {"layout": "row", "row_length": 40}
    for limits, form, message in (
        ({"window_size": (4, 0)}, {}, "cu_seqlens: expected chunks of at least the 4 rows of a halo, got 2"),
        ({"window_size": (2, 0), "max_seqlen": 31}, {}, "max_seqlen: expected at least the 32 tokens of document 1"),
        ({"max_seqlen": 8}, packed, "max_seqlen: expected at least the 32 tokens of document 1, got 8"),
    ):
        for backend in BACKENDS:
            common = {"group": dist.group.WORLD, "method": "halo", "backend": backend}
            batch = prepare_batch(offsets, **limits, **form, **common)
            mask = {name: x for name, x in limits.items() if name == "window_size"}
            out, lse = zigzag_attention(q, k, v, batch, **mask, layout=batch.layout, return_lse=True, **common)
            gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
            assert all(x.isnan().all() for x in (out, lse, *gradients)), (message, backend)
        promise = {"halo": batch.halo, "max_seqlen": batch.max_seqlen or None}
        with pytest.raises(ValueError, match=message):
            validate(offsets, 2, **form, group=dist.group.WORLD, **promise)
        with pytest.raises(ValueError, match=message):
            prepare_batch(offsets.tolist(), **limits, **form, group=dist.group.WORLD, method="halo")
    with pytest.raises(ValueError, match="cu_seqlens: expected chunks of at least the 4 rows of a halo, got 2"):
        zigzag_attention(q, k, v, offsets.tolist(), window_size=(4, 0), group=dist.group.WORLD, method="halo")
    zigzag_attention(q, k, v, offsets.tolist(), window_size=(2, 0), group=dist.group.WORLD, method="halo")


def check_disagreements(rank):
    q, k, v = (torch.ones(20, heads, 16, device=DEVICE) for heads in (2, 1, 1))
    offsets = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
    common = {"group": dist.group.WORLD, "method": "halo"}
    batch = prepare_batch(offsets, window_size=(4, 0), **common)
    small = {"window_size": (4, 0)}
    for call, message in (
        (lambda: zigzag_attention(q, k, v, batch, window_size=(5, 0), **common), "window_size: expected at most the 4"),
        (lambda: zigzag_attention(q, k, v, batch, **common), "window_size: .* got none of them$"),
        (lambda: zigzag_attention(q, k, v, batch, causal=False, **small | {"window_size": (4, 1)}, **common), "causal"),
        (lambda: zigzag_attention(q, k, v, window_size=(11, 0), **common), "window_size: expected at most the 10 rows"),
        (
            lambda: zigzag_attention(q, k, v, attention_chunk=12, **common),
            "got 11 positions before a row, the least of window_size, attention_chunk and max_seqlen",
        ),
        (lambda: prepare_batch(offsets, **common), "window_size: expected a limit to the left"),
        (lambda: prepare_batch(offsets, max_seqlen=0, **common), "max_seqlen: expected None, or"),
        (
            lambda: prepare_batch(offsets, layout="row", row_length=40, window_size=(11, 0), **common),
            "window_size: expected at most the 10 rows of a chunk",
        ),
        (lambda: prepare_batch(offsets, window_size=(4 + rank, 0), **common), "layout: rank 0 has document, halo 4"),
        (
            lambda: zigzag_attention(q, k, v, offsets, window_size=(4 + rank, 0), **common),
            "window_size: rank 0 has .*halo: rank 0 has",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def check_choice():
    """A call that names no method takes halos where they serve; one that sees farther gathers, with the same batch."""
    group, window = dist.group.WORLD, {"window_size": (4, 0)}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(24, heads, 16, generator=generator).to(DEVICE) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 13, 48], dtype=torch.int32, device=DEVICE)
    rows = {"layout": "row", "row_length": 48}
    batch = prepare_batch(offsets, group=group, **window, **rows)
    assert (batch.method, batch.halo) == ("halo", 4)
    for options, method in (
        ({}, "allgather"),
        (window, "allgather"),  # of these documents only the device knows the lengths
        (rows, "allgather"),
        (rows | {"window_size": (13, 0)}, "allgather"),
        (rows | window | {"method": "ring"}, "ring"),
    ):
        assert prepare_batch(offsets, group=group, **options).method == method
    assert prepare_batch([0, 48], group=group, **window).method == "halo"
    common = {"group": group, "layout": "row"}
    out, far = (zigzag_attention(q, k, v, batch, **mask, **common) for mask in (window, {}))
    assert torch.equal(out, zigzag_attention(q, k, v, offsets, **window, **common))
    gathered, far_gathered = (
        zigzag_attention(q, k, v, offsets, method="allgather", **mask, **common) for mask in (window, {})
    )
    torch.testing.assert_close(out, gathered)
    assert torch.equal(far, far_gathered)
    alone, named = (zigzag_attention(q, k, v, **window, group=group, method=method) for method in (None, "halo"))
    assert torch.equal(alone, named)
