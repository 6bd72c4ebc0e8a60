"""The cost model against counts made another way: masks, messages, buffers and a timeline of events."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from tests.support import oracle
from tests.support.cases import CASES, INTERPRET
from zigzag_kernels import cost
from zigzag_kernels.cost import Machine, Step, prediction
from zigzag_kernels.documents import plan_documents

UNEVEN = {"lengths": (48, 0, 96, 16), "heads": 6, "kv_heads": 2, "head_dim": 16}
LONG = {"heads": 32, "kv_heads": 8, "head_dim": 128}
DIRECTIONS = cost.forward, cost.backward


@pytest.mark.parametrize("causal", [True, False])
def test_scores_are_those_of_the_mask(causal):
    for case in [case for case in CASES if case.tags & INTERPRET]:
        for rank in range(case.world_size):
            seen = 0
            for length in case.lengths:
                positions = oracle.rank_positions(length, rank, case.world_size)
                seen += (np.arange(length)[None, :] <= positions[:, None]).sum() if causal else len(positions) * length
            assert cost.unmasked_scores(case.lengths, rank, case.world_size, causal) == seen, (case, rank)


@pytest.mark.parametrize("causal", [True, False])
def test_scores_are_those_of_ranges(causal):
    windows, chunks = [(-1, -1), (0, 0), (3, -1), (-1, 4), (5, 2), (100, 100)], [0, 1, 4, 7, 50]
    for window, chunk, length, real in itertools.product(windows, chunks, (1, 8, 13), (0, 5, 13)):
        mask = cost.Mask(causal, window, chunk)
        for position, rows in ((0, length), (length // 2, length - length // 2)):
            seen = oracle_mask(mask, np.arange(position, position + rows), min(real, length)).sum()
            assert cost.visible_scores(position, rows, min(real, length), mask) == seen, (mask, length, real, position)


def oracle_mask(mask, positions, length):
    """Whether the queries at `positions` of a document of `length` tokens see each of its keys: `[rows, keys]`."""
    p, k = positions[:, None], np.arange(length)[None, :]
    left, right = mask.window_size
    seen = (k <= p) if mask.causal else np.ones((len(positions), length), bool)
    seen &= (left < 0) | (k >= p - left)
    seen &= (right < 0) | (k <= p + right)
    if mask.attention_chunk:
        seen &= k // mask.attention_chunk == p // mask.attention_chunk
    return seen & (p < length)


def received(step):
    """(forward, backward) bytes that reach one rank, message by message."""
    size = {"float32": 4, "bfloat16": 2}
    window = (step.tokens, 2, step.window, step.head_dim)
    forward = backward = 0
    for _peer in range(1, step.world_size):
        for _window in range(0, step.kv_heads, step.window):
            forward += math.prod(window) * size[step.dtype]
            backward += math.prod(window) * (size[step.dtype] + size[step.grad_reduce_dtype])
    if step.ring:  # its gradients make one hop more
        backward += math.prod(window) * size[step.grad_reduce_dtype]
    return forward, backward


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("method", ["allgather", "ring"])
def test_bytes_between_ranks(method, world_size):
    stride = 1 if method == "allgather" else None
    for reduce_dtype in ("float32", "bfloat16"):
        sizes = UNEVEN | {"heads_k_stride": stride, "grad_reduce_dtype": reduce_dtype}
        step = Step(world_size=world_size, method=method, **sizes)
        assert tuple(direction(step).moved_bytes for direction in DIRECTIONS) == received(step)
        if world_size == 1:
            assert [direction(step).transfers for direction in DIRECTIONS] == [0, 0]
            assert cost.extra_memory(step) == {"delta, lse in base 2": 2 * 4 * 6 * 160}


HALO = {"lengths": (64, 0, 96, 32), "heads": 6, "kv_heads": 2, "head_dim": 16, "window_size": (3, -1), "method": "halo"}


def test_bytes_of_halos():
    """Messages of three rows for each of four documents, from one neighbour or two; at most half of the rows."""
    step = Step(world_size=4, padding=5, **HALO)
    row = 2 * 2 * 16
    for rank, neighbours in ((0, 1), (1, 2), (3, 1)):
        found = [direction(step, rank).moved_bytes for direction in DIRECTIONS]
        assert found == [neighbours * 12 * row * 2, neighbours * 12 * row * (2 + 4)]
    whole = Step(world_size=2, **HALO | {"lengths": (64,), "window_size": (16, -1)})
    assert cost.forward(whole).moved_bytes == 16 * row * 2
    alone = Step(world_size=1, **HALO)
    assert [direction(alone).transfers for direction in DIRECTIONS] == [0, 0]


def test_rows_that_need_a_halo_are_the_first_of_chunks_whose_keys_others_have():
    step, mask = Step(world_size=4, **HALO), cost.Mask(True, HALO["window_size"])
    for rank in range(4):
        seen = 0
        for length in HALO["lengths"]:
            positions, chunk = oracle.rank_positions(length, rank, 4), length // 8
            for position in positions:
                first = position // max(chunk, 1) * chunk
                local = first == 0 or (rank == 3 and first == 4 * chunk)
                near = not local and position - first < 3
                seen += oracle_mask(mask, np.array([position]), length).sum() * near
        assert step.halo_scores(rank) == seen


def test_halos_cost_no_more_with_more_ranks():
    """And their efficiency is a share that falls with the links; what they do not serve is refused."""
    for window in (127, 1023, 4095):
        sizes = {"window_size": (window, -1), "method": "halo", **LONG}
        steps = [Step(lengths=(8192 * ranks,), world_size=ranks, **sizes) for ranks in (4, 64, 1024)]
        machines = Machine(), Machine(nvlink=50e9, network=2e9)
        assert len({cost.forward(step, 2).moved_bytes for step in steps}) == 1
        for step in steps:
            found = [cost.predict(step, machine, 2).efficiency for machine in machines]
            assert 1 + 1e-12 >= found[0] >= found[1] > 0
            assert found[0] > found[1] or window < 4095  # narrow windows hide slow transfers too
            gathering = dataclasses.replace(step, method="allgather")
            assert step.world_size == 4 or found[0] > cost.predict(gathering, machines[0], 2).efficiency
    for changed, message in (
        ({"window_size": (-1, -1)}, "window_size: expected a limit"),
        ({"window_size": (5, -1)}, "cu_seqlens: expected chunks of at least the 5 rows"),
        ({"causal": False}, "causal: expected True"),
        ({"heads_k_stride": 1}, "heads_k_stride: expected None with method 'halo'"),
    ):
        with pytest.raises(ValueError, match=message):
            Step(world_size=4, **HALO | changed)


PLANNED = (90, 700, 33, 340, 12, 260, 64, 410, 5, 150, 120, 81)


@pytest.mark.parametrize("mask", [{}, {"window_size": (20, -1)}, {"causal": False}])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_plan_costs_the_scores_of_its_documents_and_the_bytes_of_split_ones(world_size, mask):
    plan = plan_documents(PLANNED, world_size, tokens=-(-sum(PLANNED) // world_size) + 150, **mask)
    step = plan.step(heads=6, kv_heads=2, head_dim=16)
    of_a_row = 2 * 2 * 16  # elements of K and V
    for rank in range(world_size):
        ahead, back = (direction(step, rank) for direction in DIRECTIONS)
        seen = 0
        for piece in plan.pieces(rank):
            positions = np.arange(piece.position, piece.position + piece.tokens)
            seen += oracle_mask(plan.mask, positions, plan.lengths[piece.document]).sum()
        assert (step.scores(rank), ahead.flops, back.flops) == (seen, 4 * 16 * 6 * seen, 10 * 16 * 6 * seen)
        assert ahead.moved_bytes == (world_size - 1) * plan.split_tokens * of_a_row * 2
        assert back.moved_bytes == (world_size - 1) * plan.split_tokens * of_a_row * (2 + 4)
    assert step.tokens == plan.tokens
    assert (ahead.transfers > 0) == (plan.split_tokens > 0 and world_size > 1)


def test_a_plan_takes_as_long_as_its_slowest_rank_and_hides_its_first_transfer():
    """Whole documents alone wait for nobody; beside split ones they take the time in which the GPU had waited."""
    plan = plan_documents([5000, 4000, 3000] * 4, 4, tokens=14000)
    whole = cost.predict_slowest(plan.step(**LONG), Machine())
    assert plan.split_tokens == 0
    assert whole.efficiency == pytest.approx(whole.forward_efficiency) == pytest.approx(1 / plan.balance)
    plan = plan_documents([30000, *[2000] * 9], 4, tokens=14000)
    for method in ("allgather", "ring"):
        for machine in (Machine(), Machine(nvlink=5e9)):
            step = plan.step(method=method, **LONG)
            for rank in range(4):
                both, split = (cost.predict(x, machine, rank) for x in (step, step.split))
                own = cost.predict(step.whole_of(rank), machine)
                for together, alone, local in (
                    (both.forward, split.forward, own.forward),
                    (both.backward, split.backward, own.backward),
                ):
                    assert max(alone, local) <= together <= (alone + local) * (1 + 1e-9)
                    assert together < alone + local or method == "ring"  # whose first transfer is hidden anyway


def test_parts_of_a_plan_that_do_not_fit_are_refused():
    for changes, message in (
        ({"whole_tokens": 9}, "whole: expected the documents of each rank if there are rows for some, got \\(\\)"),
        ({"whole": ((3,), (4,))}, "whole: expected the documents of each rank"),
        ({"whole_tokens": 9, "whole": ((3,), (4, 6))}, "whole: expected documents of 9 tokens for each rank"),
        ({"whole_tokens": 9, "whole": ((3,), (4, 1.5))}, "whole: expected numbers of tokens, got 1.5"),
        ({"whole_tokens": 9, "whole": (3, 4)}, "whole: expected the tokens of each document, got 3"),
        ({"whole_tokens": 9, "whole": 2}, "whole: expected the documents of each rank"),
        ({"whole_tokens": -1}, "whole_tokens: expected an int of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Step(lengths=(8,), world_size=2, **LONG | changes)


def test_all_ranks_of_a_batch_cost_the_same():
    for causal, world_size in itertools.product((True, False), (2, 4, 8)):
        step = Step(world_size=world_size, causal=causal, **UNEVEN)
        for direction in DIRECTIONS:
            assert len({direction(step, rank) for rank in range(world_size)}) == 1
    all_scores = sum(length * (length + 1) // 2 for length in UNEVEN["lengths"])
    assert cost.forward(Step(world_size=8, **UNEVEN)).flops == 4 * 16 * 6 * all_scores // 8
    assert cost.backward(Step(world_size=8, **UNEVEN)).flops == 10 * 16 * 6 * all_scores // 8


def test_memory_is_that_of_the_buffers():
    """Local tokens 160 / 4 = 40; two buffers of K and V of one head from all ranks, and one of float32 dK, dV."""
    local, heads = (40, 2, 1, 16), (40, 2, 2, 16)
    gathered = (4, *local)
    arrays = np.empty((2, 3, 40), "f4"), np.empty(gathered, "f2"), np.empty(gathered, "f2"), np.empty(gathered, "f4")
    sent = np.empty(local, "f2"), np.empty(local, "f2"), np.empty(local, "f4")
    step = Step(world_size=4, heads_k_stride=1, **UNEVEN)
    assert sum(cost.extra_memory(step).values()) == sum(x.nbytes for x in arrays + sent)
    arrays = np.empty((2, 6, 40), "f4"), np.empty(heads, "f2"), np.empty(heads, "f2"), np.empty((40, 6, 16), "f4")
    sums = np.empty(heads, "f4"), np.empty(heads, "f4")
    step = Step(world_size=4, method="ring", **UNEVEN)
    assert sum(cost.extra_memory(step).values()) == sum(x.nbytes for x in arrays + sums)


def test_efficiency_is_a_share_and_falls_with_the_links():
    machines = [Machine(), Machine(nvlink=200e9, network=20e9), Machine(nvlink=50e9, network=2e9)]
    for method, ranks_, tokens in itertools.product(("allgather", "ring"), (2, 8, 64, 1024), (1024, 8192, 65536)):
        step = Step(lengths=(tokens * ranks_,), world_size=ranks_, method=method, **LONG)
        found = [cost.predict(step, machine).efficiency for machine in machines]
        assert 1 + 1e-12 >= found[0] >= found[1] >= found[2] > 0, (method, ranks_, tokens, found)
        if tokens == 1024:
            assert found[0] > found[1] > found[2]
    alone = cost.predict(Step(lengths=(65536,), world_size=1, **LONG), Machine())
    assert alone.efficiency == pytest.approx(1)


@pytest.mark.parametrize(
    ("before", "after", "arriving", "leaving"),
    [(2, 1, 0, 0), (2, 1, 5, 0), (2, 1, 1, 4), (2, 1, 3, 0.5), (2, 5, 1, 2), (0, 0, 3, 2)],
)
def test_overlap_is_that_of_a_timeline(before, after, arriving, leaving):
    """Against events: the link brings K/V of the next part, then takes gradients of this one; parts wait for both."""
    parts, device, link = 4, 0.0, 0.0
    for part in range(parts):
        begin = max(device, link)
        link = begin + (arriving if part + 1 < parts else 0)
        link = max(link, begin + before) + leaving
        device = begin + before + after
    assert prediction.overlap(parts, before, after, arriving, leaving) == pytest.approx(max(device, link))


def test_links():
    flat, nodes = Machine(node=1), Machine()
    assert nodes.collective(1, 1e6) == nodes.hop(1, 1e6) == 0
    assert nodes.collective(8, 33e6) == pytest.approx(7 * 33e6 / 330e9 + 8.4e-6 + 7 * 3.4e-6)
    # 16 ranks in two nodes: each adapter brings an eighth of what the other node has.
    slow = dataclasses.replace(nodes, network=1e9)
    assert slow.collective(16, 1e9) == pytest.approx(1, rel=1e-3)
    assert flat.collective(16, 45e6) == pytest.approx(15e-3 + 8.4e-6 + 15 * 14e-6)
    assert nodes.hop(16, 45e6) == flat.hop(2, 45e6) == pytest.approx(1e-3 + 22.4e-6)
    with pytest.raises(ValueError, match="world_size: expected whole nodes of 8 ranks, got 12"):
        nodes.hop(12, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (20,)}, "multiples of 2 \\* world_size = 16, got 20"),
        ({"method": "tree"}, "method: expected"),
        ({"dtype": "int8"}, "dtype: expected float16, bfloat16, float32, got 'int8'"),
        ({"heads": 3}, "heads: expected a multiple of the 2 KV heads, got 3"),
        ({"heads": 6.0}, "heads: expected an int of at least 1, got 6.0"),
        ({"head_dim": None}, "head_dim: expected an int of at least 1, got None"),
        ({"padding": -1}, "padding: expected an int of at least 0, got -1"),
        ({"padding": 1.5}, "padding: expected an int of at least 0, got 1.5"),
        ({"causal": "no"}, "causal: expected True or False, got 'no'"),
        ({"dtype": []}, "dtype: expected float16, bfloat16, float32, got \\[\\]"),
        ({"lengths": 48}, "lengths: expected the tokens of each document, got 48"),
        ({"lengths": (-16, 16)}, "lengths: expected numbers of tokens, got -16"),
        ({"real_lengths": (48, 0, 97, 16)}, "real_lengths: expected real lengths from 0 to the 96 rows"),
        ({"real_lengths": (48, 0, -1, 16)}, "real_lengths: expected numbers of tokens, got -1"),
        ({"real_lengths": (48,)}, "real_lengths: expected one for each of 4 documents, got 1"),
        ({"heads_k_stride": 3}, "heads_k_stride: expected a divisor of the 2 KV heads, got 3"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        Step(**UNEVEN | {"world_size": 8} | changes)
    with pytest.raises(ValueError, match="rank: expected 0 to 7, got 8"):
        cost.forward(Step(world_size=8, **UNEVEN), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hbm": 0}, "hbm: expected a positive finite number, got 0"),
        ({"nvlink": -1}, "nvlink: expected a positive finite number, got -1"),
        ({"network": float("nan")}, "network: expected a positive finite number, got nan"),
        ({"forward_rate": "513e12"}, "forward_rate: expected a number, got '513e12'"),
        ({"call_latency": -1e-6}, "call_latency: expected seconds, 0 or more"),
        ({"dkdv_share": 1.5}, "dkdv_share: expected a number from 0 to 1, got 1.5"),
        ({"node": 0}, "node: expected an int of at least 1, got 0"),
    ],
)
def test_machines_that_do_not_exist_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Machine(**changes)


def test_a_window_that_ends_with_its_row_is_causal():
    """Calls accept halos with it, and so do steps."""
    step = Step(world_size=4, **HALO)
    same = dataclasses.replace(step, causal=False, window_size=(3, 0))
    assert [direction(step, 1) for direction in DIRECTIONS] == [direction(same, 1) for direction in DIRECTIONS]


def test_a_step_without_rows_takes_no_time():
    found = cost.predict_slowest(plan_documents([], 2).step(**LONG), Machine())
    assert (found.forward, found.backward, found.efficiency, found.forward_efficiency) == (0, 0, 1, 1)
