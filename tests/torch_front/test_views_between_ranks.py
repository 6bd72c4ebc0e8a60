"""Between ranks q, k and v are read where a projection left them, and cotangents as autograd hands them on."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

import zigzag_torch
from tests.support import oracle
from tests.support.cases import Case, make_inputs
from tests.support.closeness import assert_close
from tests.support.machine import GPU
from tests.support.processes import run_ranks, torch_numpy
from tests.support.rank import batch_results, rank_arrays, rank_rows, rows_of_results

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
CASE = Case(name="views", world_size=2, lengths=(24, 8), heads=4, kv_heads=2)
HEADS = CASE.heads, CASE.kv_heads, CASE.kv_heads, 1  # of q, k, v, and of something else that is not to be read


def projection(rank, inputs):
    """`[T, heads of q, k, v and of what is not to be read, head_dim]`."""
    q, k, v, *_ = rank_arrays(CASE, inputs, rank, key_rows=rank_rows(CASE, rank))
    others = torch.full((CASE.tokens, HEADS[-1], CASE.head_dim), float("nan"))
    return torch.cat([*map(torch.tensor, (q, k, v)), others], 1).requires_grad_()


def losses(inputs):
    """{name: (loss of out, the cotangent of every row)}: autograd expands them without a copy."""
    weights = torch.tensor(inputs["dout"][0, 0])
    return {
        "one number for all": (lambda out: out.sum(), torch.ones(())),
        "one row for all": (lambda out: out.sum((0, 1)) @ weights, weights),
        "one for each head": (lambda out: (out.sum(0) * weights).sum(), weights),
        "columns": (lambda out: (out.mT.contiguous().mT * weights).sum(), weights),
    }


def check_views(rank, world_size):
    inputs, rows = make_inputs(CASE), rank_rows(CASE, rank)
    cu_seqlens = torch.tensor(CASE.cu_seqlens, dtype=torch.int32)
    for name, (loss, cotangent) in losses(inputs).items():
        inputs["dout"][:], inputs["dlse"][:] = cotangent.numpy(), 0
        exact, straightforward = (
            rows_of_results(batch_results(CASE, inputs, x), rows)
            for x in (oracle.EXACT, oracle.straightforward(CASE.dtype))
        )
        for method in ("allgather", "ring"):
            fused = projection(rank, inputs)
            q, k, v, _ = fused.split(HEADS, 1)
            assert not any(x.is_contiguous() for x in (q, k, v))
            out = zigzag_torch.zigzag_attention(
                q, k, v, cu_seqlens, group=dist.group.WORLD, method=method, heads_k_stride=1, backend="interpret"
            )
            loss(out).backward()
            *gradients, others = fused.grad.split(HEADS, 1)
            results = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
            for result, x in results.items():
                where = f"rank {rank}, {method}, {name}: {result}"
                assert_close(where, torch_numpy(x), exact[result], straightforward[result])
            assert not others.any()


def check_views_apart(rank, world_size):
    """K and V have strides of their own: tokens before heads, and heads before tokens."""
    case = dataclasses.replace(CASE, window_size=(2, -1))
    inputs = make_inputs(case)
    inputs["dlse"][:] = 2
    exact, straightforward = (
        rows_of_results(batch_results(case, inputs, x), rank_rows(case, rank))
        for x in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    arrays = rank_arrays(case, inputs, rank, key_rows=rank_rows(case, rank))
    q, k, v, dout = (torch.tensor(x) for x in arrays[:4])
    v = v.transpose(0, 1).contiguous().transpose(0, 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert k.stride() != v.stride()
    options = {"group": dist.group.WORLD, "window_size": case.window_size, "backend": "interpret"}
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    for method in ("allgather", "ring", "halo"):
        out, lse = zigzag_torch.zigzag_attention(*leaves, cu_seqlens, method=method, return_lse=True, **options)
        gradients = torch.autograd.grad((out * dout).sum() + 2 * lse.sum(), leaves)  # dlse is one number, expanded
        for name, x in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True):
            assert_close(f"rank {rank}, {method}: {name}", torch_numpy(x), exact[name], straightforward[name])


def test_one_cotangent_for_all_of_lse_gives_the_gradients_on_one_device():
    case = dataclasses.replace(CASE, world_size=1)
    inputs = make_inputs(case)
    inputs["dlse"][:] = 2
    exact, straightforward = (
        batch_results(case, inputs, x) for x in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    leaves = [torch.tensor(inputs[name], requires_grad=True) for name in "qkv"]
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    out, lse = zigzag_torch.zigzag_attention(*leaves, cu_seqlens, return_lse=True, backend="interpret")
    gradients = torch.autograd.grad((out * torch.tensor(inputs["dout"])).sum() + 2 * lse.sum(), leaves)
    for name, x in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_close(name, torch_numpy(x), exact[name], straightforward[name])


def test_k_and_v_of_different_strides_are_read_where_they_are(tmp_path):
    run_ranks(CASE.world_size, tmp_path, check_views_apart)


def test_views_of_one_projection_and_expanded_cotangents_give_the_gradients_of_the_whole_batch(tmp_path):
    run_ranks(CASE.world_size, tmp_path, check_views)
