"""The program that times all ranks in turn, on a CPU: checks, launches, the cost model's counts, the table."""

import itertools

import pytest

from bench import ranks, timing
from tests.support.cases import CASES
from tests.support.machine import GPU
from zigzag_kernels import cost
from zigzag_kernels.cost import Step
from zigzag_torch import launch

PLAYED = next(case for case in CASES if case.name == "w3")
DEVICE, BACKEND = ("cuda", "triton") if GPU else ("cpu", "interpret")


def step_of(case, **changes):
    sizes = {name: getattr(case, name) for name in ("lengths", "world_size", "heads", "kv_heads", "head_dim", "dtype")}
    return Step(causal=case.causal, padding=case.padding, **sizes | changes)


def test_a_rank_is_checked_before_it_is_timed():
    """Rank 1 of three: its ring meets its own keys, an earlier rank's and a later one's."""
    tensors = timing.inputs(PLAYED, DEVICE)
    windows = ranks.pack_windows(*tensors[1:3], 1)
    player = ranks.Player(PLAYED, 1, tensors, 1, BACKEND)
    player.check(windows, tensors)
    with pytest.raises(AssertionError, match=r"w3, rank 1: out of windows"):
        player.check(windows[::-1], tensors)
    q, *_ = tensors
    expected = timing.exact(PLAYED, 1, 1, *tensors)
    with pytest.raises(AssertionError, match=r"w3, rank 1: out of KV head 1 is off"):
        timing.check(PLAYED, 1, 1, (q, q, *tensors[1:3]), expected)


def test_played_launches_are_those_of_the_model(monkeypatch):
    """Launches, and bytes of the arrays that they read and write, as they are really made."""
    run, seen = launch.run, []

    def count(made, *arrays):
        results = run(made, *arrays)
        inputs = dict(zip(made.inputs, arrays, strict=True))
        unread = {"segments", "sequences", "dlse", "sinks"}
        if not made.constexprs.get("ACCUMULATE"):
            unread |= set(made.in_place.values())
        seen.append(sum(x.nbytes for name, x in inputs.items() if name not in unread) + sum(x.nbytes for x in results))
        return results

    tensors = timing.inputs(PLAYED, DEVICE)
    window = ranks.pack_windows(*tensors[1:3], PLAYED.kv_heads)
    player = ranks.Player(PLAYED, 0, tensors, PLAYED.kv_heads, BACKEND)
    out, lse = player.windows_forward(window)
    sums = player.new_sums()
    monkeypatch.setattr(launch, "run", count)
    x = step_of(PLAYED).arrays()
    casts = {"allgather": (0, x.kv_sum + x.kv), "ring": (x.q_sum + x.q, x.q_sum + x.q + x.kv_sum + x.kv)}
    calls = {
        "allgather": (
            lambda: player.windows_forward(window),
            lambda: player.windows_backward(window, out, lse, player.local_rows),
        ),
        "ring": (player.ring_forward, lambda: player.ring_backward(out, lse, sums)),
    }
    for method, stride in (("allgather", PLAYED.kv_heads), ("ring", None)):
        step = step_of(PLAYED, method=method, heads_k_stride=stride)
        for direction, call, cast in zip((cost.forward, cost.backward), calls[method], casts[method], strict=True):
            seen.clear()
            call()
            expected = direction(step)
            assert len(seen) == expected.launches
            assert sum(seen) + cast + expected.moved_bytes == expected.hbm_bytes, (method, direction)


def test_table_and_picture_of_made_up_times(tmp_path):
    keys = itertools.product(range(2), ranks.WAYS, ranks.DIRECTIONS)
    times = {(rank, way, direction): 2.0 + rank * (way == "ring") for rank, way, direction in keys}
    assert ranks.spread(times, "ring", "forward") == 1.5
    assert ranks.spread(times, "one launch", "backward") == 1
    rows = [line.strip("| ").split(" | ") for line in ranks.table(times)]
    assert rows[-2] == ["slowest / fastest", "1.0000", "1.0000", "1.5000", "1.0000", "1.0000", "1.5000"]
    assert rows[-1] == ["mean over one launch", "1.000", "1.000", "1.250", "1.000", "1.000", "1.250"]
    ranks.save_plot(tmp_path / "ranks.png", {"made up": times})
    assert (tmp_path / "ranks.png").stat().st_size > 5_000
