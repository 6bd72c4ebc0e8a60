"""In which type ranks add up what they and others contribute, where it shows: contributions that all but cancel."""

import itertools

import pytest
import torch
import torch.distributed as dist

import zigzag_torch
from tests.support import cancelling, oracle
from tests.support.cancelling import CASE
from tests.support.cases import RESULTS
from tests.support.closeness import assert_close
from tests.support.machine import GPU
from tests.support.processes import run_ranks, torch_numpy
from tests.support.rank import batch_results, rank_arrays, rank_rows, rows_of_results

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")


def rank_tensors(rank):
    """q, k, v, dout, dlse of a rank, and cu_seqlens."""
    *arrays, dlse = rank_arrays(CASE, cancelling.make_inputs(), rank, key_rows=rank_rows(CASE, rank))
    tensors = (torch.tensor(x, dtype=torch.bfloat16) for x in arrays)
    return *tensors, torch.tensor(dlse), torch.tensor(CASE.cu_seqlens, dtype=torch.int32)


def attend(q, k, v, dout, dlse, cu_seqlens, **options):
    """{name: array} for each of RESULTS."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = zigzag_torch.zigzag_attention(
        *leaves, cu_seqlens, group=dist.group.WORLD, causal=CASE.causal, return_lse=True, **options
    )
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return {name: torch_numpy(x) for name, x in zip(RESULTS, (out, lse, *gradients), strict=True)}


def check_sums(rank, world_size):
    inputs, rows = cancelling.make_inputs(), rank_rows(CASE, rank)
    exact, straightforward = (
        rows_of_results(batch_results(CASE, inputs, x), rows)
        for x in (oracle.EXACT, oracle.straightforward(CASE.dtype))
    )
    for method, backend in itertools.product(("ring", "allgather"), ("interpret", "reference")):
        options = {"method": method, "backend": backend}
        sums = {
            dtype: attend(*rank_tensors(rank), grad_reduce_dtype=dtype, **options)
            for dtype in (None, torch.float32, torch.bfloat16)
        }
        for name in RESULTS:
            where = f"rank {rank}, {options}: {name}"
            assert_close(where, sums[torch.float32][name], exact[name], straightforward[name])
            assert sums[None][name].tobytes() == sums[torch.float32][name].tobytes(), where
            if name not in ("dk", "dv"):
                assert sums[torch.bfloat16][name].tobytes() == sums[torch.float32][name].tobytes(), where
                continue
            with pytest.raises(AssertionError, match="by Frobenius norm exceeds"):
                assert_close(where, sums[torch.bfloat16][name], exact[name], straightforward[name])


def test_ranks_sum_in_float32_and_gradients_of_keys_in_the_type_that_is_asked_for(tmp_path):
    run_ranks(CASE.world_size, tmp_path, check_sums)
