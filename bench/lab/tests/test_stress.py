"""The stress run: launches of tiny packings, its complaints about wrong results, and a device that hangs."""

import pytest
import torch

from bench.lab import stress
from tests.support.hopper import needs_hopper
from tests.support.machine import GPU, LATENESS
from zigzag_torch import launch

TINY = {
    "signatures": (
        {"world_size": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "float16"},
        {"world_size": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "dtype": "bfloat16", "causal": False},
    ),
    "tokens": 16,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """A player of tiny packings in the interpreter; no more than three sequences."""
    if GPU:
        pytest.skip("kernels are not interpreted here")
    monkeypatch.setattr(stress, "SEQUENCES", 3)
    monkeypatch.setattr(stress, "PADDING", 3)
    monkeypatch.setattr(stress, "AHEAD", 2)
    return stress.Player("cpu", "interpret", TINY["tokens"])


def test_packings_are_of_all_sizes_and_can_be_drawn_again():
    packings = [stress.draw(0, number) for number in range(1000)]
    assert packings[:20] == [stress.draw(0, number) for number in range(20)]
    assert packings[0] != stress.draw(1, 0)
    cases = [packing.case for packing in packings]
    assert {1, stress.SEQUENCES} <= {len(case.lengths) for case in cases} <= set(range(1, stress.SEQUENCES + 1))
    assert all(0 < case.tokens <= stress.TOKENS + stress.PADDING for case in cases)
    local = [length // case.world_size for case in cases for length in case.lengths]
    assert 0 in local
    assert max(local) > stress.TOKENS // 2
    # Chunks far shorter than a tile of 64 rows, about as long, and far longer.
    for low, high in ((1, 8), (100, 200), (1000, 4097)):
        assert sum(low <= length < high for length in local) > 50
    assert {(case.head_dim, case.world_size) for case in cases} == {
        (128, 1), (128, 2), (128, 4), (128, 8), (64, 1), (64, 4), (64, 8), (256, 2), (192, 1),
    }  # fmt: skip
    assert {(case.window_size, case.attention_chunk) for case in cases} == {
        ((-1, -1), 0), ((300, -1), 0), ((1000, -1), 0), ((-1, -1), 256),
    }  # fmt: skip
    assert all(0 <= packing.rank < packing.case.world_size for packing in packings)


def test_a_run(small, capsys):
    """Two forward passes and one backward pass of each packing, thrice; the portable kernels' are not counted."""
    assert stress.main(["--launches", "13"], small, **TINY) == 0
    counts = {"attention_forward": 12, "backward_dkdv": 6, "backward_dq": 6}
    assert small.counts == counts
    line = capsys.readouterr().out.splitlines()[-1]
    said = "24 launches (12 attention_forward, 6 backward_dkdv, 6 backward_dq) of 2 packings in "
    assert line.startswith(said)
    assert line.endswith(" s: no hang, no difference")
    assert stress.main(["--seconds", "0"], small, **TINY) == 0
    assert small.counts == counts


@pytest.mark.parametrize(("signature", "world_size"), [(0, 2), (1, 1)])
def test_packings_of_one_signature(small, signature, world_size, monkeypatch):
    start, played = small.start, []

    def remember(packing, against_portable):
        played.append(packing.case)
        return start(packing, against_portable)

    monkeypatch.setattr(small, "start", remember)
    assert stress.main(["--launches", "13", "--signature", str(signature)], small, **TINY) == 0
    assert [case.world_size for case in played] == [world_size, world_size]


@pytest.mark.parametrize(
    "arguments", [["--signature", "2"], ["--signature", "-1"], ["--signature", "0", "--packing", "3"]]
)
def test_a_signature_that_does_not_exist_or_a_packing_with_it(small, arguments, capsys):
    with pytest.raises(SystemExit):
        stress.main(arguments, small, **TINY)
    assert "--signature: expected 0 to 1 without --packing, got" in capsys.readouterr().err


def test_one_packing_is_played_alone_and_what_differs_is_said(small, monkeypatch, capsys):
    run, seen = launch.run, []

    def wrong(made, *arrays):
        results = run(made, *arrays)
        if made.kernel.fn.__name__ == "backward_dq":
            seen.append(made)
            if len(seen) == 2:
                results[0][0, 1] = float("nan")
        return results

    monkeypatch.setattr(launch, "run", wrong)
    assert stress.main(["--packing", "3", "--seed", "5"], small, **TINY) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "--seed 5 --packing 3" in lines[0]
    assert [line.rpartition("): ")[2] for line in lines[:-1]] == [
        f"fused and pair: dq is off by nan {measure}" for measure in stress.BOUNDS
    ]
    assert lines[-1].endswith(" s: no hang, 2 complaints")


def test_an_error_of_the_device_names_the_packings(small, monkeypatch, capsys):
    def fail(made, *arrays):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(launch, "run", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        stress.main(["--seed", "7"], small, **TINY)
    assert "--seed 7 --packing 0" in capsys.readouterr().out


def test_what_differences_are_too_large():
    generator = torch.Generator().manual_seed(0)
    right = [torch.randn(50, 2, 16, generator=generator) for _ in range(4)]
    assert not stress.complaints(stress.differences(right, right), bitwise=True)
    close = [x * 1.001 for x in right]
    assert not stress.complaints(stress.differences(close, right), bitwise=False)
    assert stress.complaints(stress.differences(close, right), bitwise=True) == [
        f"out is off by 1.0e-03 {measure}" for measure in stress.BOUNDS
    ]
    right[2][7] *= 0.05  # a short row
    row = [x.clone() for x in right]
    row[2][7, 1] = 0
    assert [x.rpartition(" ")[2] for x in stress.complaints(stress.differences(row, right), bitwise=True)] == ["row"]
    nothing = [torch.zeros(3, 2, 16) for _ in range(4)]
    assert not stress.complaints(stress.differences(nothing, nothing), bitwise=True)


class Event:
    """Stands for an event in a stream; `queries` until the device has come to it."""

    def __init__(self, queries):
        self.queries = queries

    def query(self):
        self.queries -= 1
        return self.queries < 0


def test_the_watchdog_names_the_packing_that_hangs(capsys):
    case, hangs = stress.draw(0, 0), stress.draw(0, 1)
    right, event, codes = torch.zeros(1, 4, 2), Event(float("inf")), []

    def end(code):
        codes.append(code)
        event.queries = 0

    with stress.Watchdog(LATENESS, end) as watchdog:
        assert not stress.Played(case, ["fused and pair"], right, Event(3)).finish(watchdog)
        assert not codes
        stress.Played(hangs, ["fused and pair"], right, event).finish(watchdog)
    assert codes == [stress.HUNG]
    assert f"no progress for {LATENESS:g} s: {hangs}" in capsys.readouterr().out
    assert not watchdog.thread.is_alive()


@pytest.mark.gpu
@needs_hopper
def test_some_packings_on_a_gpu(capsys):
    assert stress.main(["--launches", "100"], signatures=stress.SIGNATURES[:1]) == 0, capsys.readouterr().out
