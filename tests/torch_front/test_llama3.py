"""The published names: signatures, both paths, what the flags do, and all ranks of a process group."""

import contextlib
import dataclasses
import inspect
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import zigzag_torch
from tests.support import oracle, pieces
from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.closeness import assert_close
from tests.support.machine import GPU
from tests.support.pieces import grouped, rank_oracle, rank_tensors, tensor
from tests.support.processes import run_ranks, torch_numpy
from tests.support.rank import batch_results, rank_arrays, rank_rows, rows_of_results
from zigzag_torch import ZigzagConfig, launch

VARLEN = (
    "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, group=None, n_chunks=2"
)
GROUPED = (
    "chunk_q_list, chunk_cu_seqlens_q_list, chunk_indices_list, kv_buffer, kv_slices, nheads, head_dim, softmax_scale, "
    "dropout_p, causal, window_size, alibi_slopes, deterministic, world_size, cu_seqlens_k"
)
SIGNATURES = {
    "zigzag_llama3_flash_attn_varlen_func": f"q, k, v, {VARLEN}",
    "zigzag_llama3_flash_attn_varlen_kvpacked_func": f"q, kv, {VARLEN}",
    "zigzag_llama3_flash_attn_varlen_qkvpacked_func": f"qkv, {VARLEN}",
    "fused_zigzag_llama3_flash_attn_forward_v2": (
        "q0, q1, k, v, cu_seqlens_q0, cu_seqlens_q1, cu_seqlens_k, chunk_idx_0, chunk_idx_1, total_chunks, "
        "softmax_scale=None, causal=True"
    ),
    "split_q_by_zigzag_chunk_index": "q, cu_seqlens_q, world_size, rank, n_chunks=2",
    "rearrange_kv_from_zigzag_to_contiguous": "kv_buffer, world_size, cu_seqlens",
    "compute_kv_slices_for_groups": (
        "cu_seqlens_k, chunk_idx_0, chunk_idx_1, world_size, chunk_cu_seqlens_q_list, n_chunks=2"
    ),
    "execute_grouped_attention": GROUPED,
    "replace_grouped_attention_with_fused_triton_v2": f"{GROUPED}, chunk_idx_0=None, chunk_idx_1=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(zigzag_torch, name)).parameters.values()
    plain = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])
    assert str(plain) == f"({SIGNATURES[name]})"


@pytest.fixture
def kernels(kernel_backend):
    with pieces.kernels(kernel_backend):
        yield


CASES = [
    Case(name="causal", world_size=4, lengths=(24, 0, 8, 32), heads=4, kv_heads=2, padding=3, softmax_scale=0.4),
    Case(name="full", world_size=4, lengths=(24, 48), heads=4, kv_heads=2, causal=False, dtype="float16"),
    Case(name="window", world_size=4, lengths=(24, 0, 56), heads=4, kv_heads=2, padding=1, window_size=(9, -1)),
    Case(name="window on both sides", world_size=4, lengths=(40, 16), heads=2, causal=False, window_size=(6, 3)),
    Case(name="odd", world_size=1, lengths=(5, 0, 1, 26), heads=2, kv_heads=2, dtype="bfloat16", softmax_scale=0.1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_stand_in_agrees_with_the_unfused_path(case, kernels):
    """In both directions, which the flag compares; and with the oracle, so that not both are wrong."""
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        q, kv, dout, dlse = rank_tensors(case, rank, inputs)
        with ZigzagConfig(verify_correctness=True):
            out, lse, info = grouped(case, rank, q, kv, fused=True)
            gradients = torch.autograd.grad((out, lse), (q, kv), (dout, dlse))
        assert info.keys() == {"chunk_indices_list", "chunk_cu_seqlens_q_list", "kv_slices"}
        results = dict(zip(RESULTS, (out, lse, gradients[0], *gradients[1]), strict=True))
        exact = rank_oracle(case, rank, inputs, oracle.EXACT)
        straightforward = rank_oracle(case, rank, inputs, oracle.straightforward(case.dtype))
        for name, x in results.items():
            assert_close(f"rank {rank}: {name}", x.detach().float().cpu().numpy(), exact[name], straightforward[name])


def test_any_number_of_groups_fused(kernels):
    case = CASES[0]
    inputs = make_inputs(case)
    q, kv, *_ = rank_tensors(case, 1, inputs)
    expected = grouped(case, 1, q, kv, fused=True)
    for n_chunks in (1, 8):
        for ours, theirs in zip(grouped(case, 1, q, kv, n_chunks, fused=True)[:2], expected, strict=False):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n_chunks", [1, 2, 8])
@pytest.mark.parametrize("rank", range(4))
def test_the_stand_in_finds_the_chunks_of_the_rank(rank, n_chunks, kernels):
    """As the guide's monkey-patch calls it: with the arguments of `execute_grouped_attention`, and no others."""
    case = CASES[0]
    q, kv, *_ = rank_tensors(case, rank, make_inputs(case))
    arguments = pieces.grouped_arguments(q, kv, tensor(case.cu_seqlens, "int32"), rank, case.world_size, case.causal)
    arguments["softmax_scale"] = case.softmax_scale

    def fused_execute(*args, **kwargs):
        return zigzag_torch.replace_grouped_attention_with_fused_triton_v2(*args, **kwargs)

    with mock.patch.object(zigzag_torch, "execute_grouped_attention", fused_execute):
        results = zigzag_torch.execute_grouped_attention(*arguments.values())
    expected = grouped(case, rank, q, kv, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(results[:2], expected[:2], strict=True))


def test_slices_that_say_nothing_of_the_rank_are_refused():
    case = CASES[0]
    q, kv, *_ = rank_tensors(case, 1, make_inputs(case))
    arguments = pieces.grouped_arguments(q, kv, tensor(case.cu_seqlens, "int32"), 1, case.world_size, case.causal)
    ranges, offsets = arguments["kv_slices"][0]
    arguments["kv_slices"][0] = [(start, end - (end > start)) for start, end in ranges], offsets
    with pytest.raises(ValueError, match=r"kv_slices: expected keys up to two chunks .* got slices of \[5, 21\] keys"):
        zigzag_torch.replace_grouped_attention_with_fused_triton_v2(**arguments)
    empty = tensor([0, 0], "int32")
    arguments = pieces.grouped_arguments(q[:0], kv[:, :0], empty, 1, case.world_size, case.causal)
    out, lse, _ = zigzag_torch.replace_grouped_attention_with_fused_triton_v2(**arguments)
    assert out.shape == (0, case.heads, case.head_dim)
    assert lse.shape == (case.heads, 0)


@pytest.mark.parametrize("flags", [{}, {"use_fused_triton_v2": False}], ids=["fused", "unfused"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_window_of_a_causal_mask_is_a_causal_mask(causal, flags, kernels):
    case = CASES[0]
    q, kv, *_ = rank_tensors(case, 1, make_inputs(case))
    local = tensor([0, *case.lengths], "int32").cumsum(0, dtype=torch.int32)
    q_whole = kv[0]
    function = zigzag_torch.zigzag_llama3_flash_attn_varlen_func
    call = q_whole, kv[0], kv[1], local, local, 0, 0, 1, slice(0)
    with ZigzagConfig(**flags):
        expected = function(*call, causal=True)
        assert torch.equal(function(*call, causal=causal, window_size=(-1, 0)), expected)
        by_rank, whole = (
            grouped(dataclasses.replace(case, causal=mask), 1, q, kv, fused=True, window_size=window)[0]
            for mask, window in ((causal, (-1, 0)), (True, (-1, -1)))
        )
        assert torch.equal(by_rank, whole)


def test_without_the_flag_nothing_is_launched(kernels, monkeypatch):
    def launched(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(launch, "run", launched)
    case = CASES[0]
    q, kv, dout, dlse = rank_tensors(case, 1, make_inputs(case))
    monkeypatch.setenv("ZIGZAG_USE_FUSED_TRITON_V2", "0")
    out, lse, _ = grouped(case, 1, q, kv, fused=True)
    torch.autograd.grad((out, lse), (q, kv), (dout, dlse))
    expected, *_ = grouped(case, 1, q, kv)
    assert torch.equal(out, expected)
    local = tensor([0, *case.lengths], "int32").cumsum(0, dtype=torch.int32)
    whole = zigzag_torch.zigzag_llama3_flash_attn_varlen_func(
        kv[0], kv[0], kv[1], local, local, 0, 0, 1, slice(0), causal=True
    )
    whole.sum().backward()
    monkeypatch.setenv("ZIGZAG_USE_FUSED_TRITON_V2", "1")
    with pytest.raises(AssertionError, match="launched"):
        grouped(case, 1, q, kv, fused=True)


def test_chunks_of_no_rank_are_refused():
    case = CASES[0]
    q, kv, *_ = rank_tensors(case, 1, make_inputs(case))
    with pytest.raises(ValueError, match=r"chunk_idx_1: expected 2 \* world_size - 1 - chunk_idx_0 = 7, got 6"):
        grouped(case, 1, q, kv, fused=True, chunk_idx_0=0)


@pytest.mark.parametrize(
    "kv_slices",
    [
        "text",
        None,
        [1, 2],
        [None, None],
        [(1, 2)],
        [([1], None)],
        [([(0, "a")], None)],
        [([(0, 2.5)], None)],
        [([(0, 4)] * 3, None)],
        [([(4, 0)], None)],
    ],
    ids=repr,
)
def test_slices_that_name_no_chunks_are_refused(kv_slices):
    case = CASES[0]
    q, kv, *_ = rank_tensors(case, 1, make_inputs(case))
    arguments = pieces.grouped_arguments(q, kv, tensor(case.cu_seqlens, "int32"), 1, case.world_size, case.causal)
    with pytest.raises(ValueError, match=r"^kv_slices: expected "):
        zigzag_torch.replace_grouped_attention_with_fused_triton_v2(**arguments | {"kv_slices": kv_slices})


def varlen_calls(case, q, k, v, group=None):
    """What the three functions give on this rank, with every stride, fused or not as the flags say."""
    cu_seqlens_k = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=q.device)
    rest = cu_seqlens_k // case.world_size, cu_seqlens_k, 0, 0
    options = {"causal": case.causal, "softmax_scale": case.softmax_scale, "window_size": case.window_size}
    options |= {"return_attn_probs": True, "group": group}
    results = []
    for heads_k_stride in (1, case.kv_heads):
        call = *rest, heads_k_stride, slice(0)
        results.append(zigzag_torch.zigzag_llama3_flash_attn_varlen_func(q, k, v, *call, **options))
        kv = torch.stack([k, v], 1)
        results.append(zigzag_torch.zigzag_llama3_flash_attn_varlen_kvpacked_func(q, kv, *call, **options))
        if case.heads == case.kv_heads:
            qkv = torch.stack([q, k, v], 1)
            results.append(zigzag_torch.zigzag_llama3_flash_attn_varlen_qkvpacked_func(qkv, *call, **options))
    return results


def test_one_device_needs_no_group(kernels):
    case = CASES[-1]
    inputs = make_inputs(case)
    q, kv, *cotangents = rank_tensors(case, 0, inputs)
    exact, straightforward = (
        rank_oracle(case, 0, inputs, x) for x in (oracle.EXACT, oracle.straightforward("bfloat16"))
    )
    with ZigzagConfig(verify_correctness=True):
        for out, lse, _ in varlen_calls(case, q, *kv):
            dq, dkv = torch.autograd.grad((out, lse), (q, kv), cotangents)
            for name, result in zip(RESULTS, (out, lse, dq, *dkv), strict=True):
                assert_close(name, torch_numpy(result), exact[name], straightforward[name])


def test_what_does_not_fit_is_refused(monkeypatch):
    q, k, offsets = torch.zeros(8, 4, 16), torch.zeros(8, 2, 16), torch.tensor([0, 8], dtype=torch.int32)

    def call(k=k, cu_seqlens_k=offsets, heads_k_stride=1, **options):
        function = zigzag_torch.zigzag_llama3_flash_attn_varlen_func
        return function(q, k, k, offsets, cu_seqlens_k, 8, 8, heads_k_stride, slice(0, 8), **options)

    for options, error, message in (
        ({"heads_k_stride": 0}, ValueError, "heads_k_stride: expected a divisor of the 2 KV heads, got 0"),
        ({"heads_k_stride": 3}, ValueError, "heads_k_stride: expected a divisor of the 2 KV heads, got 3"),
        ({"n_chunks": 3}, ValueError, r"n_chunks: expected 1 to 2 \* world_size = 2, got 3"),
        ({"k": k[:4]}, ValueError, "k: expected the 8 rows of q, got 4"),
        ({"cu_seqlens_k": offsets[:1]}, ValueError, r"cu_seqlens_k: expected the shape of cu_seqlens_q, .* got \(1,\)"),
        ({"dropout_p": 0.5}, NotImplementedError, "dropout_p"),
        ({"window_size": 4}, ValueError, r"window_size: expected \(left, right\)"),
        ({"alibi_slopes": q}, NotImplementedError, "alibi_slopes"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call(**options)
    contradiction = {"cu_seqlens_k": torch.tensor([0, 4], dtype=torch.int32)}
    assert call(**contradiction).isnan().all()
    monkeypatch.setenv("ZIGZAG_USE_FUSED_TRITON_V2", "0")
    with pytest.raises(ValueError, match=r"cu_seqlens_k: expected 1 times cu_seqlens_q, \[0, 8\], got \[0, 4\]"):
        call(**contradiction)


def check_rank(rank, world_size, cases, flags, backend):
    """Every call of every case against the oracle, in the group of this process."""
    for case in cases:
        inputs = make_inputs(case)
        rows = rank_rows(case, rank)
        *arrays, dlse = rank_arrays(case, inputs, rank, key_rows=rows)
        q, k, v, dout = (torch.tensor(x, dtype=getattr(torch, case.dtype)) for x in arrays)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        expected, straightforward = (
            rows_of_results(batch_results(case, inputs, x), rows)
            for x in (oracle.EXACT, oracle.straightforward(case.dtype))
        )
        with pieces.kernels(backend), ZigzagConfig(**flags):
            calls = varlen_calls(case, *leaves)
            assert len(calls) == (6 if case.heads == case.kv_heads else 4)
            for out, lse, third in calls:
                assert third is None
                results = out, lse, *torch.autograd.grad((out, lse), leaves, (dout, torch.tensor(dlse)))
                for name, result in zip(RESULTS, results, strict=True):
                    where = f"{case}, {flags}, rank {rank}: {name}"
                    assert_close(where, torch_numpy(result), expected[name], straightforward[name])


GQA = Case(name="gqa", world_size=4, lengths=(40, 0, 8, 16), heads=4, kv_heads=2, padding=2, softmax_scale=0.4)
FULL = Case(
    name="full", world_size=4, lengths=(16, 24), heads=2, kv_heads=2, causal=False, softmax_scale=0.1, dtype="bfloat16"
)


WINDOWS = [
    Case(name="window", world_size=4, lengths=(40, 16), heads=4, kv_heads=2, window_size=(7, -1)),
    Case(name="window on both sides", world_size=4, lengths=(40, 16), causal=False, window_size=(7, 2)),
]


@pytest.mark.skipif(GPU, reason="the ranks share one CPU")
@pytest.mark.parametrize(
    ("flags", "cases", "backend"),
    [
        ({"use_fused_triton_v2": False}, [GQA, FULL, *WINDOWS], None),
        ({"verify_correctness": True}, [GQA, FULL, *WINDOWS], None),
        ({}, [GQA], "interpret"),
    ],
    ids=["unfused", "both", "kernels"],
)
def test_all_ranks_of_a_group(flags, cases, backend, tmp_path):
    run_ranks(4, tmp_path, check_rank, cases, flags, backend)


def check_compiled(rank, world_size, backend, by_default):
    """In one graph the same as eagerly; the names `by_default` without a group, the others with one."""
    local = torch.tensor([0, 4, 12], dtype=torch.int32)
    values = torch.randn(3, 12, 2, 16, generator=torch.Generator().manual_seed(rank))
    packed = {"func": (0, 1, 2), "kvpacked_func": (0, [1, 2]), "qkvpacked_func": ([0, 1, 2],)}
    with pieces.kernels(backend):
        for name, arguments in packed.items():
            function = getattr(zigzag_torch, f"zigzag_llama3_flash_attn_varlen_{name}")
            group = None if name in by_default else dist.group.WORLD

            def step(x, arguments=arguments, function=function, group=group):
                tensors = (x[i] if isinstance(i, int) else x[i].transpose(0, 1) for i in arguments)
                call = local, world_size * local, 8, 8 * world_size, 1, slice(0, 12)
                return function(*tensors, *call, causal=True, return_attn_probs=True, group=group)[:2]

            results = []
            for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
                x = values.clone().requires_grad_()
                out, lse = call(x)
                results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), x)])
            for eager, compiled in zip(*results, strict=True):
                torch.testing.assert_close(compiled, eager)


@pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
@pytest.mark.parametrize(
    ("backend", "by_default"),
    [
        pytest.param("reference", ("kvpacked_func", "qkvpacked_func"), marks=pytest.mark.slow, id="reference"),
        pytest.param("interpret", ("func",), marks=pytest.mark.slow, id="interpret"),
    ],
)
def test_published_names_compile_into_one_graph(backend, by_default, tmp_path):
    run_ranks(2, tmp_path, check_compiled, backend, by_default)


@contextlib.contextmanager
def gathered_shapes():
    """The shapes of what this process sends to every rank of a group, in a list that fills as it does."""
    name = "all_gather_single" if hasattr(dist.ProcessGroup, "all_gather_single") else "_allgather_base"
    gather, shapes = getattr(dist.ProcessGroup, name), []

    def recorded(group, into, x, *options):
        shapes.append(tuple(x.shape))
        return gather(group, into, x, *options)

    with mock.patch.object(dist.ProcessGroup, name, recorded):
        yield shapes


def check_gathers(rank, world_size):
    tokens, heads, head_dim = 8, 4, 16
    local = torch.tensor([0, tokens], dtype=torch.int32)
    q, k, v = torch.randn(3, tokens, heads, head_dim)
    packed = {
        "func": (q, k, v),
        "kvpacked_func": (q, torch.stack([k, v], 1)),
        "qkvpacked_func": (torch.stack([q, k, v], 1),),
    }
    for name, tensors in packed.items():
        function = getattr(zigzag_torch, f"zigzag_llama3_flash_attn_varlen_{name}")
        for use_fused_triton_v2 in (True, False):
            for heads_k_stride in (1, 2, 4):
                call = local, world_size * local, tokens, tokens, heads_k_stride, slice(0)
                with ZigzagConfig(use_fused_triton_v2=use_fused_triton_v2), gathered_shapes() as shapes:
                    function(*tensors, *call, causal=True)
                both = tokens, 2 * heads_k_stride, head_dim
                assert shapes == [both] * (heads // heads_k_stride), (name, use_fused_triton_v2)


@pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
def test_heads_k_stride_is_how_many_kv_heads_one_transfer_brings(tmp_path):
    run_ranks(2, tmp_path, check_gathers)
