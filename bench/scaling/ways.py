"""The ways to compute attention of the benchmark's batches, and the prediction of the cost model for each."""

import dataclasses
import functools
import statistics
from collections.abc import Sequence

from tests.support.cases import Case
from zigzag_kernels import cost
from zigzag_kernels.cost import Machine, Step
from zigzag_kernels.documents import DocumentPlan, plan_documents
from zigzag_kernels.modes import Method

Way = tuple[str, int | None]  # method and heads_k_stride
ALONE = "one GPU's share", None
PLANNED = "plan of documents", None  # most documents whole on one rank, the others by all-gather
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
ROOM = 1.0, 1.02, 1.04, 1.06, 1.08, 1.1  # rows of a rank over its share of the tokens
PASSES = cost.forward, cost.backward


@functools.lru_cache(maxsize=1)
def plan_of(lengths: tuple[int, ...], ranks: int) -> DocumentPlan:
    """Return the plan that is predicted to take the least time, with a tenth of padding at most.

    Documents that fill all rows to the last one can only be split, all of them.
    """
    tokens = sum(lengths) // ranks

    def seconds(plan: DocumentPlan) -> float:
        sizes = {name: HEADS[name] for name in ("heads", "kv_heads", "head_dim")}
        found = cost.predict_slowest(plan.step(**sizes), Machine(node=ranks))
        return found.forward + found.backward

    return min((plan_documents(lengths, ranks, tokens=round(share * tokens)) for share in ROOM), key=seconds)


def step_of(case: Case, way: Way) -> Step:
    """Return the step of a way for the cost model."""
    sizes = {name: getattr(case, name) for name in ("heads", "kv_heads", "head_dim", "dtype")}
    if way == PLANNED:
        return plan_of(case.lengths, case.world_size).step(**sizes)
    (method, stride), batch = way, ("lengths", "world_size", "window_size", "causal")
    return Step(**{name: getattr(case, name) for name in batch}, method=method, heads_k_stride=stride, **sizes)


def predictions(case: Case, ways: Sequence[Way], share: Sequence[float]) -> dict[tuple[Way, int], float]:
    """Return {(way, direction): predicted efficiency} at the rate at which one GPU does its `share`.

    `share` are its milliseconds, forward and forward + backward.
    """
    alone = step_of(case, (Method.ALLGATHER.value, None))
    forward, both = share
    flops = [statistics.mean(x(alone, rank).flops for rank in range(case.world_size)) for x in PASSES]
    rates = [1e3 * work / ms for work, ms in zip(flops, (forward, max(both - forward, forward)), strict=True)]
    machine = dataclasses.replace(Machine(node=case.world_size), forward_rate=rates[0], backward_rate=rates[1])
    found = {way: cost.predict_slowest(step_of(case, way), machine) for way in ways}
    return {
        (way, i): efficiency
        for way, prediction in found.items()
        for i, efficiency in enumerate((prediction.forward_efficiency, prediction.efficiency))
    }
