"""Blocks of keys and rows that a causal mask hides are never multiplied: with them results are equal, and come late."""

from collections import Counter
from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from tests.support import planned
from tests.support.cases import Case, make_inputs
from tests.support.machine import GPU
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import make_problem

pytestmark = pytest.mark.skipif(GPU, reason="counts what the interpreter does")
# A causal mask leaves each rank half of the keys, and every tile a part of a block at the diagonal beside them.
MOST_OF_ALL = 0.62
CASE = Case(name="long", world_size=2, lengths=(256,), heads=1, dtype="float16")


class Work:
    """Counts what the kernels that it runs do, by the name of the kernel's first result."""

    def __init__(self):
        self.products, self.writes = Counter(), Counter()
        self.blocks, self.whole_blocks = Counter(), Counter()  # of rows that are read, and without a mask

    def run(self, launch, *arrays):
        name = launch.outputs[0].name

        def counted(counter, function, only=lambda x: True):
            def count(x, *others):
                counter[name] += only(x)
                return function(x, *others)

            return count

        def is_block(pointers):
            return pointers.data.ndim == 2

        builder = interpreter_builder
        functions = {
            "create_dot": counted(self.products, builder.create_dot),
            "create_masked_store": counted(self.writes, builder.create_masked_store),
            "create_load": counted(self.whole_blocks, builder.create_load, is_block),
            "create_masked_load": counted(self.blocks, builder.create_masked_load, is_block),  # the other calls it
        }
        with mock.patch.multiple(builder, **functions):
            return planned.interpret(launch, *arrays)


@pytest.mark.parametrize("rank", range(CASE.world_size))
def test_a_causal_mask_halves_the_products_of_every_kernel_on_every_rank(rank):
    tensors, work = planned.rank_tensors(CASE, make_inputs(CASE), rank), {}
    for causal in (True, False):
        work[causal] = Work()
        planned.attend(*tensors, CASE.cu_seqlens, rank, CASE.world_size, causal=causal, run=work[causal].run)
    assert set(work[False].products) == {"out", "dk", "dq"}
    for name, products in work[False].products.items():
        assert work[True].products[name] <= MOST_OF_ALL * products, name


PARTLY_FILLED = Case(name="the last tile of keys is half empty", world_size=1, lengths=(80,), heads=1, dtype="float16")


@pytest.mark.parametrize("case", [CASE, PARTLY_FILLED], ids=str)
def test_blocks_that_every_row_sees_whole_are_read_without_masks(case):
    work = Work()
    tensors = planned.rank_tensors(case, make_inputs(case), 0)
    planned.attend(*tensors, case.cu_seqlens, 0, case.world_size, causal=False, run=work.run)
    for name in ("out", "dk", "dq"):
        assert work.whole_blocks[name] >= 0.8 * work.blocks[name] > 0, name


RANGES = {
    "a causal window": ({"window_size": (15, 0)}, 16),
    "a window on both sides": ({"causal": False, "window_size": (15, 16)}, 32),
    "chunks": ({"attention_chunk": 32}, 17),
}


@pytest.mark.parametrize("rank", range(CASE.world_size))
@pytest.mark.parametrize(("mask", "seen"), RANGES.values(), ids=RANGES)
def test_a_range_of_keys_costs_its_area(mask, seen, rank):
    """A tile of rows reads the blocks that some row sees: their keys, and at most one block more at either end."""
    tensors, work, all_work = planned.rank_tensors(CASE, make_inputs(CASE), rank), Work(), Work()
    planned.attend(*tensors, CASE.cu_seqlens, rank, CASE.world_size, causal=False, run=all_work.run)
    planned.attend(*tensors, CASE.cu_seqlens, rank, CASE.world_size, run=work.run, **mask)
    length, block = CASE.lengths[0], 32  # the larger side of all tiles in the interpreter
    for name, products in all_work.products.items():
        assert work.products[name] <= (seen + 2 * block) / length * products, name


def test_blocks_inside_of_every_rows_window_are_read_without_masks():
    case = Case(name="wide window", world_size=1, lengths=(256,), heads=1, dtype="float16")
    work = Work()
    tensors = planned.rank_tensors(case, make_inputs(case), 0)
    planned.attend(*tensors, case.cu_seqlens, 0, 1, run=work.run, window_size=(127, 0))
    for name in ("out", "dk", "dq"):
        assert work.whole_blocks[name] >= 0.5 * work.blocks[name] > 0, name


def ring_steps(rank, causal):
    """The `Work` of each step of a ring on `rank`."""
    q, k, v, dout, dlse = planned.rank_tensors(CASE, make_inputs(CASE), rank)
    lengths, ranks = torch.tensor(CASE.cu_seqlens, dtype=torch.int32), torch.tensor([rank], dtype=torch.int32)
    call = make_call_spec(head_dim=CASE.head_dim, backend="interpret", causal=causal, method="ring")
    sizes = {"sequences": 1, "world_size": CASE.world_size, "target": "interpret", "kv_layout": KVLayout.PEER}
    problem = make_problem(*[planned.spec(q)] * 3, call, **sizes)
    segments, sequences = plan.segment_tables(planned.interpret, lengths, ranks, **sizes)
    strides, part = {"dout_strides": dout.stride()[:2]}, plan.Part(accumulate=True, dtype="float32")
    for step in range(CASE.world_size):
        work, peer = Work(), (rank - step) % CASE.world_size
        here = slice(peer * CASE.tokens, (peer + 1) * CASE.tokens)
        dq, dk, dv, out = torch.zeros(4, *q.shape)
        results = out, torch.full((CASE.heads, CASE.tokens), float("-inf"))
        results = plan.forward(work.run, problem, q, k[here], v[here], segments[step], part=part, into=results)
        rows = plan.backward_rows(planned.interpret, problem, *results, dout, dlse, **strides)
        arguments = work.run, problem, q, k[here], v[here], dout, rows
        plan.backward_keys(*arguments, sequences[step], part=part, into=(dk, dv), **strides)
        plan.backward_queries(*arguments, segments[step], part=part, into=dq, **strides)
        yield work


@pytest.mark.parametrize("rank", range(CASE.world_size))
def test_a_causal_mask_halves_the_products_of_all_steps_of_a_ring(rank):
    of_all, of_visible = (sum((work.products for work in ring_steps(rank, x)), Counter()) for x in (False, True))
    assert set(of_all) == {"out", "dk", "dq"}
    for name, products in of_all.items():
        assert of_visible[name] <= MOST_OF_ALL * products, name


def test_a_ring_step_leaves_rows_that_see_none_of_its_keys_alone():
    """Of the keys of a later rank the early chunk sees none, so only the late one is read and written."""
    own, of_later_rank = ring_steps(0, causal=True)
    for name in ("out", "dq"):
        assert 2 * of_later_rank.writes[name] == own.writes[name] > 0, name
