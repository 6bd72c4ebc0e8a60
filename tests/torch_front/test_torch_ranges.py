"""Windows, chunks, caps, sinks, real lengths and the row layout in PyTorch, against the float64 oracle."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import zigzag_torch
from tests.support import oracle
from tests.support.cases import RANGES, Case, make_inputs, select
from tests.support.frameworks import attend_torch, call_options, prepare_torch
from tests.support.machine import GPU, GPUS
from tests.support.planners import RememberingPlanner
from tests.support.processes import run_ranks, torch_numpy
from tests.support.rank import (
    accept_capped_scores,
    assert_rank_is_right,
    assert_results_close,
    batch_results,
    rank_arrays,
    rank_rows,
    rows_of_results,
)
from zigzag_kernels import plan
from zigzag_kernels.hopper.family import HOPPER
from zigzag_torch import prepare_batch, zigzag_attention, zigzag_attention_gathered

DEVICE, KERNELS = ("cuda", "triton") if GPU else ("cpu", "interpret")
BACKENDS = KERNELS, "reference"
BETWEEN = [
    (2, ["w2-row-all"]),
    pytest.param(
        2, ["w2-window-left", "w2-sinks", "w2-lengths-full", "w2-all", "w2-row-batch"], marks=pytest.mark.slow
    ),
    pytest.param(3, ["w3-window-both", "w3-all", "w3-row-window"], marks=pytest.mark.slow),
]
ALL = {"window_size": (6, -1), "attention_chunk": 9, "softcap": 2.0}


def find(name):
    return next(case for case in RANGES if case.name == name)


@pytest.mark.parametrize("case", RANGES, ids=str)
def test_the_reference_matches_the_oracle(case):
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        results = attend_torch(case, *rank_arrays(case, inputs, rank), rank, "reference", sinks=inputs.get("sinks"))
        assert_rank_is_right(case, inputs, rank, {"reference": results})


TOGETHER = {"window_size": (33, 40), "attention_chunk": 50, "softcap": 2.0, "sinks": True}
OPTIONS = {
    "one key": {"window_size": (0, 0)},
    "left": {"window_size": (7, -1)},
    "both sides": {"window_size": (31, 6)},
    "right": {"window_size": (-1, 3)},
    "chunk": {"attention_chunk": 19},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "lengths": {},
    "row": {},
    "all": TOGETHER,
    "all in rows": TOGETHER,
}


def with_option(case, option):
    """`case` with one of OPTIONS; its documents one token longer in the row layout."""
    changes = dict(OPTIONS[option])
    if option in ("lengths", "all", "all in rows"):
        changes["lengths_real"] = tuple(max(length - 5 * i % 7, 0) for i, length in enumerate(case.lengths, 1))
    if option in ("row", "all in rows"):
        longer = tuple(length + (length > 0) for length in case.lengths)
        changes |= {"layout": "row", "lengths": longer, "padding": -sum(longer) % (2 * case.world_size)}
    return replace(case, name=f"{case.name} {option}", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", select("interpret"), ids=str)
def test_every_case_with_every_option(case, backend, option):
    """On a GPU each of them compiles kernels of its own, which workers share out."""
    variant = with_option(case, option)
    inputs = make_inputs(variant)
    rank = len(variant.name) % case.world_size  # the first and others
    arrays = rank_arrays(variant, inputs, rank)
    with plan.use_planner(RememberingPlanner()) as planner:
        results = attend_torch(variant, *arrays, rank, backend, sinks=inputs.get("sinks"))
    if any(kernel.family == HOPPER.name for kernel in planner.kernels):
        accept_capped_scores(variant, inputs, rank, results)
    assert_rank_is_right(variant, inputs, rank, {f"{variant}, {backend}": results})


def attend(tensors, sinks, **options):
    """{name: tensor} of a call between ranks: out, lse, dq, dk, dv, max_logits and dsinks."""
    q, k, v, dout, dlse, batch = tensors
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        leaves.append(sinks.detach().clone().requires_grad_())
        options["sinks"] = leaves[3]
    out, lse, max_logits = zigzag_attention(*leaves[:3], batch, return_lse=True, **options)
    dq, dk, dv, *dsinks = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "max_logits": max_logits}
    return results | dict(zip(("dsinks",), dsinks, strict=False))


def check_cases(rank, world_size, expected):
    for name, (exact, straightforward) in expected.items():
        case, inputs = find(name), make_inputs(find(name))
        rows = rank_rows(case, rank)
        arrays = rank_arrays(case, inputs, rank, key_rows=rows)
        tensors = [torch.tensor(x, dtype=getattr(torch, case.dtype), device=DEVICE) for x in arrays[:4]]
        tensors.append(torch.tensor(arrays.dlse, device=DEVICE))
        sinks = torch.tensor(inputs["sinks"], device=DEVICE) if case.sinks else None
        cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=DEVICE)
        for backend in BACKENDS:
            for method in ("ring", "allgather"):
                common = {"group": dist.group.WORLD, "method": method}
                batch = prepare_torch(case, cu_seqlens, rank, backend, **common)
                options = common | call_options(case) | {"backend": backend, "heads_k_stride": 1}
                results = attend((*tensors, batch), sinks, **options)
                if case.rows > 1:  # their dimension says the same as a prepared batch
                    packed = [x.unflatten(0, (case.rows, -1)) for x in tensors[:3]]
                    out, _ = zigzag_attention(*packed, cu_seqlens, **options)
                    assert torch.equal(out.flatten(0, 1), results["out"])
                results = {result: torch_numpy(x) for result, x in results.items()}
                mine = [rows_of_results(x, rows) for x in (exact, straightforward)]
                if case.sinks:  # those of this rank's rows
                    mine[0]["dsinks"] = mine[0]["sink_terms"].sum(1)
                assert_results_close(f"rank {rank} of {world_size}, {name}, {backend}, {method}", results, *mine)


@pytest.mark.multigpu
@pytest.mark.parametrize(("world_size", "names"), BETWEEN)
def test_ranks_match_the_oracle_of_the_whole_batch(world_size, names, tmp_path):
    if GPU and world_size > len(GPUS):
        pytest.skip(f"needs {world_size} GPUs")
    expected = {}
    for case in map(find, names):
        inputs = make_inputs(case)
        arithmetics = oracle.EXACT, oracle.straightforward(case.dtype)
        expected[case.name] = [batch_results(case, inputs, x) for x in arithmetics]
    run_ranks(world_size, tmp_path, check_cases, expected, backend="nccl" if GPU else "gloo")


def check_agreement(rank, world_size):
    group = dist.group.WORLD
    q, k, v = (torch.ones(8, heads, 16) for heads in (2, 1, 1))
    cu_seqlens, lengths = torch.tensor([0, 4, 16], dtype=torch.int32), torch.tensor([3, 12 - rank], dtype=torch.int32)
    for name, options in {
        "window_size": {"window_size": (rank, -1)},
        "attention_chunk": {"attention_chunk": rank},
        "softcap": {"softcap": float(rank)},
        "sinks": {"sinks": torch.zeros(2) if rank else None},
        "return_max_logits": {"return_max_logits": bool(rank)},
        "layout": {"layout": ("document", "row")[rank]},
    }.items():
        with pytest.raises(ValueError, match=rf"expected the same call .*{name}: rank 0 has"):
            zigzag_attention(q, k, v, cu_seqlens, group=group, backend="reference", **options)
    foul = q.clone()
    foul[3, 0] = 1.0 if rank else float("nan")
    for method in ("allgather", "ring"):
        options = {"group": group, "method": method, "backend": "reference"}
        _, max_logits = zigzag_attention(foul, k, v, cu_seqlens, return_max_logits=True, **options)
        assert max_logits.isnan().tolist() == [True, False]
        batch = prepare_batch(cu_seqlens, lengths=lengths, **options)
        out, max_logits = zigzag_attention(q, k, v, batch, return_max_logits=True, **options)
        assert out.isnan().all()
        assert max_logits.isnan().all()
        with pytest.raises(ValueError, match="lengths: rank 0 has a tensor, rank 1 has nothing"):
            prepare_batch(cu_seqlens, lengths=None if rank else lengths, **options)
        with pytest.raises(ValueError, match="layout: rank 0 has row, 2 of 8 tokens, rank 1 has row, 1 of 16 tokens"):
            prepare_batch(cu_seqlens, layout="row", row_length=8 * (1 + rank), rows=2 - rank, **options)


def test_ranks_that_ask_for_other_ranges_are_told(tmp_path):
    run_ranks(2, tmp_path, check_agreement)


def check_graphs(rank, world_size):
    warnings.simplefilter("ignore")  # dynamo's own
    group = dist.group.WORLD
    torch.manual_seed(rank)
    q, k, v = (torch.randn(8, heads, 16, device=DEVICE, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.tensor([0.5, -1.0, 2.0, float("-inf")], device=DEVICE, requires_grad=True)
    cu_seqlens, lengths = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 7, 13], [5, 6]))
    for backend in BACKENDS:
        for method in ("ring", "allgather"):

            def step(q, k, v, sinks, method=method, backend=backend):
                form = {"layout": "row", "row_length": 16, "lengths": lengths}
                batch = prepare_batch(cu_seqlens, group=group, method=method, backend=backend, **form)
                options = ALL | {"return_lse": True, "return_max_logits": True, "layout": "row", "backend": backend}
                return zigzag_attention(q * 2, k, v, batch, group=group, method=method, sinks=sinks, **options)

            eager, compiled = (
                _results(function, (q, k, v, sinks))
                for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
            )
            for x, y in zip(eager, compiled, strict=True):
                assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.multigpu
def test_a_graph_between_ranks_computes_the_same(tmp_path):
    run_ranks(2, tmp_path, check_graphs, backend="nccl" if GPU else "gloo")


def _results(function, leaves):
    out, lse, max_logits = function(*leaves)
    visible = torch.where(lse.isinf(), 0.0, lse)
    return out, lse, max_logits, *torch.autograd.grad(out.square().sum() + visible.sum(), leaves)


SMALL = Case(name="small", world_size=1, lengths=(9, 5), heads=4, kv_heads=2, sinks=True, **ALL)


def small(**changes):
    """(q, k, v, sinks) that want gradients, and `cu_seqlens`."""
    case = replace(SMALL, **changes)
    inputs = make_inputs(case)
    leaves = [torch.tensor(inputs[name], requires_grad=True, device=DEVICE) for name in ("q", "k", "v", "sinks")]
    return leaves, int32(case.cu_seqlens)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_transforms_and_modes_compute_the_same(backend):
    warnings.simplefilter("ignore")  # dynamo's own
    leaves, cu_seqlens = small()
    options = ALL | {"return_lse": True, "return_max_logits": True, "backend": backend}

    def call(q, k, v, sinks, options=options):
        return zigzag_attention(q, k, v, cu_seqlens, sinks=sinks, **options)

    expected = _results(call, leaves)
    for x, y in zip(_results(torch.compile(call, fullgraph=True, backend="aot_eager"), leaves), expected, strict=True):
        assert torch.equal(x, y)
    out, _, max_logits = expected[:3]
    assert not max_logits.requires_grad
    found = torch.func.grad(lambda *x: call(*x)[0].square().sum(), (0, 1, 2, 3))(*(x.detach() for x in leaves))
    wanted = torch.autograd.grad(call(*leaves)[0].square().sum(), leaves)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    with torch.autocast(DEVICE, torch.bfloat16):
        half, *_ = call(*leaves)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, atol=3e-2, rtol=3e-2)
    with torch.no_grad():
        lean = zigzag_attention(*leaves[:3], cu_seqlens, sinks=leaves[3], backend=backend, **ALL)
    assert torch.equal(lean, out)
    only_maxima = zigzag_attention(*leaves[:3], cu_seqlens, return_max_logits=True, backend=backend, **ALL)
    assert torch.equal(only_maxima[1], max_logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_of_a_graph_may_change(backend):
    """A window and a cap that a model passes as numbers, which a graph then has as symbols."""
    warnings.simplefilter("ignore")  # dynamo's own
    (q, k, v, sinks), cu_seqlens = small()

    def call(left, chunk, cap):
        options = {"window_size": (left, -1), "attention_chunk": chunk, "softcap": cap, "sinks": sinks}
        return zigzag_attention(q, k, v, cu_seqlens, backend=backend, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for numbers in (3, 5, 1.0), (4, 6, 2.0), (7, 9, 3.0):
        assert torch.equal(compiled(*numbers), call(*numbers))


def test_operators_are_what_torch_wants():
    leaves, cu_seqlens = small()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    batch = prepare_batch(cu_seqlens, backend=KERNELS, lengths=int32([7, 5]))
    key = _call_key(return_max_logits=True)
    tables, ops = (batch.segments, batch.sequences), torch.ops.zigzag
    arguments = *leaves[:3], *tables, key, 1, "gathered", leaves[3]
    torch.library.opcheck(ops.attention_forward, arguments, test_utils=tests)
    q, k, v, sinks = (x.detach() for x in leaves)
    out, statistics = ops.attention_forward(q, k, v, *tables, key, 1, "gathered", sinks)
    backward = q, k, v, out, statistics[0], out, None, *tables, key, 1, "gathered", sinks
    torch.library.opcheck(ops.attention_backward, backward, test_utils=tests)
    rank, lengths = int32([0]), int32([7, 5])
    for form in (lengths, "document", 0, 1), (None, "row", 16, 1):
        table_arguments = cu_seqlens, rank, 2, "gathered", KERNELS, *form
        torch.library.opcheck(ops.segment_tables, table_arguments, test_utils=tests)


def _call_key(**options):
    from zigzag_kernels.callspec import make_call_spec

    return make_call_spec(head_dim=16, backend=KERNELS, has_sinks=True, has_lengths=True, **ALL, **options).key


def test_sinks_of_any_type_and_stride():
    leaves, cu_seqlens = small()
    q, k, v, sinks = (x.detach() for x in leaves)
    expected = zigzag_attention(q, k, v, cu_seqlens, sinks=sinks.bfloat16().float())
    for other in (sinks.bfloat16(), sinks.bfloat16().double(), sinks.bfloat16().repeat_interleave(2)[::2]):
        other.requires_grad_()
        out = zigzag_attention(q, k, v, cu_seqlens, sinks=other)
        assert torch.equal(out, expected)
        (gradient,) = torch.autograd.grad(out.sum(), other)
        assert gradient.dtype == other.dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_only_the_device_knows_becomes_nan(backend):
    leaves, cu_seqlens = small()
    for lengths in ([10, 5], [9, -1]):
        batch = prepare_batch(cu_seqlens, lengths=int32(lengths), backend=backend)
        options = {"return_lse": True, "return_max_logits": True, "backend": backend}
        results = zigzag_attention(*leaves[:3], batch, sinks=leaves[3], **options)
        for x in (*results, *torch.autograd.grad(results[0].sum() + results[1].sum(), leaves)):
            assert x.isnan().all()
    q, k, v, _ = leaves
    straddling = int32([0, 10, 12])
    batch = prepare_batch(straddling, 1, 2, layout="row", row_length=8, rows=2, backend=backend)
    assert zigzag_attention_gathered(q[:8], k.new_ones(16, 2, 16), v.new_ones(16, 2, 16), batch, 1, 2, layout="row",
                                     backend=backend).isnan().all()  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy interprets
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window_size": (3, -1)}, {"softcap": 2.0}])
def test_a_foul_score_is_the_largest(options, backend):
    """Of the heads that see it, whatever a maximum makes of NaN."""
    (q, k, v, sinks), cu_seqlens = small()
    for x, heads in ((q, {0}), (k, {0, 1})):
        foul = x.detach().clone()
        foul[2, 0, 5] = float("nan")
        arrays = (foul, k, v) if x is q else (q, foul, v)
        common = options | {"sinks": sinks, "return_max_logits": True, "backend": backend}
        _, max_logits = zigzag_attention(*arrays, cu_seqlens, **common)
        assert set(max_logits.isnan().nonzero().flatten().tolist()) == heads


def test_no_rows_have_no_largest_logit():
    q, k = torch.ones(0, 2, 16), torch.ones(0, 1, 16)
    _, max_logits = zigzag_attention(q, k, k, [0], return_max_logits=True)
    assert torch.isneginf(max_logits).all()
    batch = prepare_batch([0, 4], lengths=[0])
    _, max_logits = zigzag_attention(torch.ones(4, 2, 16), *[torch.ones(4, 1, 16)] * 2, batch, return_max_logits=True)
    assert torch.isneginf(max_logits).all()


def test_packed_rows_as_a_batch_on_one_device():
    """Documents of several packed rows, whose dimension stays; one rank holds them whole."""
    q, k = torch.randn(2, 8, 2, 16), torch.randn(2, 8, 1, 16)
    cu_seqlens = torch.tensor([0, 3, 8, 15], dtype=torch.int32)
    out, lse = zigzag_attention(q, k, k, cu_seqlens, layout="row", return_lse=True)
    flat = zigzag_attention(q.flatten(0, 1), *[k.flatten(0, 1)] * 2, cu_seqlens)
    assert torch.equal(out.flatten(0, 1), flat)
    assert lse.shape == (2, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected None with q .* got .* q of shape \(2, 8, 2, 16\)"):
        zigzag_attention(q, k, k, cu_seqlens)


def test_padding_of_real_lengths_serves_a_full_mask():
    """Real tokens do not see the padding of pad_to_zigzag where lengths say what is padding."""
    x, cu_seqlens = torch.randn(9, 1, 16), torch.tensor([0, 5, 9], dtype=torch.int32)
    padded, offsets = zigzag_torch.pad_to_zigzag(x, cu_seqlens, 2)
    lengths = cu_seqlens.diff().int()
    shards = []
    for rank in range(2):
        q = zigzag_torch.shard(padded, offsets, rank, 2)
        keys = torch.cat([zigzag_torch.shard(padded, offsets, peer, 2) for peer in range(2)])
        batch = prepare_batch(offsets, rank, 2, lengths=lengths, backend="reference")
        shards.append(zigzag_attention_gathered(q, keys, keys, batch, rank, 2, causal=False, backend="reference"))
    whole = zigzag_torch.unpad(zigzag_torch.unshard(torch.cat(shards), offsets, 2), cu_seqlens, 2)
    torch.testing.assert_close(whole, zigzag_attention(x, x, x, cu_seqlens, causal=False))
    assert np.isfinite(whole.numpy()).all()
