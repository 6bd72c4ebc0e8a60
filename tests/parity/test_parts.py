"""Attention in parts, as ranks exchange keys: windows of KV heads, the steps of a ring, keys in position order."""

import numpy as np
import pytest

from tests.support.cases import CASES, RESULTS, make_inputs
from tests.support.machine import GPU
from tests.support.parts import FRAMEWORKS, Rank
from tests.support.rank import assert_rank_is_right, gathered_rows
from zigzag_kernels.modes import KVLayout

INTERPRETED = ("w1-odd-group", "w2-uneven", "w2-full", "w2-empty-runs", "w2-all-empty", "w2-padding", "w2-d256", "w3")
INTERPRETED_IN_JAX = ("w1-odd-group", "w2-uneven")
COMPILED = ("w2-edges", "w2-edges-full", "w3-d96", "w4-d256", "w5-d40", "w8-64-uneven", "w8-one-token-chunks")
SELECTED = [case for case in CASES if case.name in INTERPRETED + (COMPILED if GPU else ())]


@pytest.mark.usefixtures("each_launch_once")
@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_parts_make_the_whole(case):
    """Every rank: windows of heads give the same bits as one launch, the ring and other layouts the same numbers.

    JAX plays every rank of compiled kernels, but of interpreted ones, which take long, the last rank of two cases.
    """
    inputs = make_inputs(case)
    gathered = gathered_rows(case)
    in_order = np.arange(case.total)
    for rank in range(case.world_size):
        seen = []
        both = GPU or (case.name in INTERPRETED_IN_JAX and rank == case.world_size - 1)
        for framework in [FRAMEWORKS["torch"], *([FRAMEWORKS["jax"]] if both else [])]:
            player = Rank(case, inputs, rank, framework)
            whole, windows = player.whole(KVLayout.GATHERED, gathered), player.windows(gathered)
            for name in RESULTS:
                assert whole[name].tobytes() == windows[name].tobytes(), f"rank {rank}: {name} of windows"
            contiguous = player.whole(KVLayout.CONTIGUOUS, in_order)
            contiguous |= {name: contiguous[name][gathered] for name in ("dk", "dv")}
            seen.append({"contiguous": contiguous, "ring": player.ring()})
        assert_rank_is_right(case, inputs, rank, seen[0])
        for kind, results in seen[0].items():
            for name in RESULTS:
                for others in seen[1:]:
                    where = f"rank {rank} of {case.world_size}: {name} of {kind}"
                    assert results[name].tobytes() == others[kind][name].tobytes(), f"{where}: torch and JAX differ"
