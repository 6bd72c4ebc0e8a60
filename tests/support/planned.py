"""One rank's attention by the plan alone: on arrays and with tiles of any kind, in Triton's interpreter."""

import functools
from dataclasses import replace

import torch

from tests.support.cases import RESULTS
from tests.support.processes import torch_numpy
from tests.support.rank import rank_arrays
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.problem import ArraySpec, make_problem
from zigzag_torch import launch as torch_launch


@functools.cache
def _interpreted(launch):
    constexprs = launch.constexprs | ({"INTERPRET": True} if "INTERPRET" in launch.constexprs else {})
    return replace(launch, target="interpret", constexprs=constexprs)


def interpret(launch, *arrays):
    """Runs a launch for any GPU in the interpreter: a `run` for the functions of `plan`."""
    return torch_launch.run(_interpreted(launch), *arrays)


def rank_tensors(case, inputs, rank):
    """q, gathered k and v, dout, dlse of a rank of `case`, from global arrays."""
    *arrays, dlse = rank_arrays(case, inputs, rank)
    return *(torch.tensor(x, dtype=getattr(torch, case.dtype)) for x in arrays), torch.tensor(dlse)


def attend(
    q, k, v, dout, dlse, cu_seqlens, rank, world_size, *, causal=True, target="interpret", run=interpret, into=None,
    **mask,
):  # fmt: skip
    """{name: array} for each of RESULTS, with gathered K/V and the tiles of `target`.

    Results for which `into` has a tensor are written there. `mask` are arguments of `make_call_spec`.
    """
    into = dict.fromkeys(RESULTS) | (into or {})
    sizes = {"sequences": len(cu_seqlens) - 1, "world_size": world_size, "target": target}
    call = make_call_spec(head_dim=q.shape[2], backend="triton", causal=causal, **mask)
    problem = make_problem(spec(q), spec(k), spec(v), call, **sizes)
    lengths, rank = torch.tensor(cu_seqlens, dtype=torch.int32), torch.tensor([rank], dtype=torch.int32)
    segments, sequences = plan.segment_tables(run, lengths, rank, **sizes)
    out, lse = plan.forward(run, problem, q, k, v, segments, into=(into["out"], into["lse"]))
    strides = {"dout_strides": dout.stride()[:2]}
    rows = plan.backward_rows(run, problem, out, lse, dout, dlse, **strides)
    arguments = run, problem, q, k, v, dout, rows
    dk, dv = plan.backward_keys(*arguments, sequences, into=(into["dk"], into["dv"]), **strides)
    dq = plan.backward_queries(*arguments, segments, into=into["dq"], **strides)
    return {name: torch_numpy(x) for name, x in zip(RESULTS, (out, lse, dq, dk, dv), strict=True)}


def spec(x):
    return ArraySpec(tuple(x.shape), str(x.dtype).removeprefix("torch."), x.stride()[:2])
