"""The comparison of attentions on a CPU: tiny cases through all of bench/run.py, and its report of made-up rows."""

import importlib
import itertools
import json
import re
import sys
import types
from dataclasses import replace

import pytest
import torch

from bench import compare, report, run, timing
from bench.compare import IMPLEMENTATIONS, Unavailable
from bench.planning import Planning
from bench.slices import scores_of
from tests.support.cases import BENCH, CASES, MASKS, QUICK, Case
from tests.support.machine import GPU
from zigzag_kernels.modes import Operation
from zigzag_kernels.plan import operation, planner
from zigzag_kernels.tiles.config import KernelId, TileConfig
from zigzag_torch import reference

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries, whose attentions are compared
DEVICE, BACKEND = ("cuda", None) if GPU else ("cpu", "interpret")
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float16"}
TINY = Case(name="rectangle-d128", world_size=2, lengths=(16, 8), **SIZES)
FULL = Case(name="full", world_size=2, lengths=(12,), causal=False, **SIZES)
SINGLE = Case(name="single", world_size=1, lengths=(24,), **SIZES)
THREE = Case(name="three", world_size=3, lengths=(24, 0, 12), **SIZES)
FORWARD = KernelId("portable", Operation.FORWARD)
PEERS = "unfused", "flash2-torch"


@pytest.fixture
def short_rounds(monkeypatch):
    monkeypatch.setattr(compare, "BACKEND", BACKEND)
    monkeypatch.setattr(run, "MASKS", [])
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(run, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(timing, "ROUND_MS", 1)
    monkeypatch.setattr(timing, "HOST_SECONDS", 0)


def make_rows(cases, times):
    """Rows as a run makes them; `times` {implementation: (forward ms, backward ms)} of every case, at 1e9 FLOPs."""
    return [
        {"case": case, "implementation": name, "direction": direction, "status": "ok", "ms": ms, "low_ms": ms,
         "high_ms": 1.5 * ms, "graph_ms": None, "host_ms": 0.1, "tflops": 1 / ms, "of_matmul": 0.5, "peak_mib": None}
        for case in cases for name, both in times.items() for direction, ms in zip(report.DIRECTIONS, both, strict=True)
    ]  # fmt: skip


def missing_row(case, name, direction, status):
    return {"case": case, "implementation": name, "direction": direction, "status": status}


def test_a_whole_run(short_rounds, monkeypatch, tmp_path, capsys):
    """Every implementation gives a row, and what cannot run says why."""
    monkeypatch.setattr(run, "CASES", [replace(TINY, tags=BENCH | QUICK), replace(FULL, tags=BENCH)])
    names = "torch", "jax", "torch-hopper", "unfused", "flash2-torch", "cudnn-torch"
    arguments = [
        "--quick",
        "--processes",
        "1",
        "--json",
        str(tmp_path / "rows.json"),
        "--plots",
        str(tmp_path / "plots"),
    ]
    assert run.main([*arguments, "--implementations", *names], DEVICE) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    keys = [(row["case"], row["implementation"], row["direction"]) for row in rows]
    assert keys == list(itertools.product([TINY.name], names, report.DIRECTIONS))
    status = {row["implementation"]: row["status"] for row in rows}
    assert {status[name] for name in ("torch", "jax", *PEERS)} == {"ok"}
    assert status["torch-hopper"] == "not available: no kernel for Hopper serves here"
    assert status["cudnn-torch"].startswith("not available: not expressible")
    assert all(0 < row["low_ms"] <= row["ms"] <= row["high_ms"] for row in rows if row["status"] == "ok")
    assert all((row["graph_ms"] is not None) == GPU for row in rows if row["implementation"] == "torch")
    assert all((tmp_path / "plots" / name).stat().st_size > 5000 for name in ("throughput.png", "speedup.png"))
    printed = capsys.readouterr().out
    assert "jax: forward + backward against the unfused path: long rectangle" in printed
    assert "torch-hopper: not available: no kernel for Hopper serves here (all cases)" in printed


@pytest.mark.parametrize("case", [TINY, FULL, SINGLE, THREE], ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_the_same_attention(case, name):
    tensors = timing.inputs(case, DEVICE)
    for rank in range(case.world_size):
        if case.world_size == 1 and name == "unfused":
            with pytest.raises(Unavailable, match="two ranks"):
                compare.prepare(name, case, rank, [tensors])
            continue
        ready = compare.prepare(name, case, rank, [tensors])
        for kv_head in range(case.kv_heads):
            expected = timing.exact(case, rank, kv_head, *tensors)
            timing.check(case, rank, kv_head, ready.calls[0].results(), expected)


@pytest.mark.parametrize("name", ["torch", "jax", *PEERS])
def test_every_set_of_inputs_has_its_own_calls(name, monkeypatch):
    monkeypatch.setattr(compare, "BACKEND", BACKEND)
    sets = [timing.inputs(TINY, DEVICE, seed) for seed in range(2)]
    ready = compare.prepare(name, TINY, 1, sets)
    with ready.planning:
        for calls, tensors in zip(ready.calls, sets, strict=True):
            timing.check(TINY, 1, 0, calls.results(), timing.exact(TINY, 1, 0, *tensors))


def test_the_mask_of_flex_attention(monkeypatch):
    """Its forward in plain PyTorch, as a CPU has no gradient of it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compare, "autograd_calls", lambda attend, leaves, dout: attend(*leaves))
    for case in (replace(TINY, dtype="float32"), replace(FULL, dtype="float32")):
        tensors = timing.inputs(case, DEVICE)
        for rank in range(case.world_size):
            (out,) = compare.flex_torch(case, rank, [tensors])
            expected, *_ = timing.exact(case, rank, 1, *tensors)
            timing.check_close("out", out[:, 2:], expected)


def small(case):
    """A short batch of the kind of `case`, whose window hides keys."""
    lengths = tuple(max(length // 512, 16) // 16 * 16 for length in case.lengths)
    window = tuple(min(side, 21) for side in case.window_size)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float16"}
    return replace(case, lengths=lengths, window_size=window, **sizes)


MASKED = [small(case) for case in MASKS if case.has_options and case.head_dim != 256]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masks_are_checked_in_both_frameworks(case, monkeypatch, each_launch_once):
    monkeypatch.setattr(compare, "BACKEND", BACKEND)
    tensors, done = timing.inputs(case, DEVICE), {}
    expected = {kv_head: timing.exact(case, run.rank_of(case), kv_head, *tensors) for kv_head in range(2)}
    for name in ("torch", "jax"):
        ready = compare.prepare(name, case, run.rank_of(case), [tensors])
        done[name] = run.check(case, run.rank_of(case), ready, expected, done)
    wrong = ready._replace(calls=[ready.calls[0]._replace(results=lambda: [1.1 * x for x in done["torch"]])])
    with pytest.raises(AssertionError, match="out of KV head 0 is off"):
        run.check(case, run.rank_of(case), wrong, expected, {})


def test_flash_attention_4_gets_the_keys_that_each_row_sees(monkeypatch):
    """The stand-in knows packed batches alone; its mask too is aligned to the last key."""

    def attend(q, k, v, *, learnable_sink, window_size, softcap, deterministic, causal, **lengths):
        assert (learnable_sink, softcap, deterministic) == (None, 0.0, True)
        window = tuple(-1 if side is None else side for side in window_size)
        mask = compare.flash2.Mask(causal, window)
        out, _ = compare.flash2.forward(q, k, v, compare.flash2.Lengths(*lengths.values()), mask, q.shape[-1] ** -0.5)
        return out, None

    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace(flash_attn_varlen_func=attend))
    for case in [TINY, FULL, THREE, *(case for case in MASKED if not case.sinks and not case.softcap)]:
        for rank in range(case.world_size):
            tensors = timing.inputs(case, DEVICE)
            ready = compare.prepare("flash4-deterministic", case, rank, [tensors])
            timing.check(case, rank, 1, ready.calls[0].results(), timing.exact(case, rank, 1, *tensors))
            mask = compare.flash2.Mask(case.causal, case.window_size)
            assert scores_of(case, rank) == reference.see(mask, *timing.places(case, rank, tensors[-1])).sum()


def test_the_exact_one_in_blocks_of_rows(monkeypatch):
    tensors = timing.inputs(TINY, DEVICE)
    whole = timing.exact(TINY, 1, 0, *tensors)
    monkeypatch.setattr(timing, "SCORES", 5 * 2 * TINY.total)
    for a, b in zip(timing.exact(TINY, 1, 0, *tensors), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_results_and_errors_are_rows_and_the_run_goes_on(short_rounds, monkeypatch, capsys):
    def wrong(case, rank, sets):
        def doubled(calls):
            return calls._replace(results=lambda: (2 * calls.results()[0], *calls.results()[1:]))

        return [doubled(calls) for calls in compare.flash2_torch(case, rank, sets)]

    def broken(case, rank, sets):
        raise MemoryError("out of\nmemory")

    monkeypatch.setattr(run, "CASES", [replace(TINY, tags=BENCH)])
    for name, make in (("torch", wrong), ("flash2-torch", broken)):
        monkeypatch.setitem(IMPLEMENTATIONS, name, replace(IMPLEMENTATIONS[name], make=make))
    here = "--processes", "1", "--implementations"
    assert run.main([*here, "flash2-torch", "unfused"], DEVICE) == 0
    assert "flash2-torch: failed: MemoryError: out of memory (all cases)" in capsys.readouterr().out
    assert run.main([*here, "torch", "unfused"], DEVICE) == 1
    printed = capsys.readouterr()
    assert "rectangle-d128, torch, forward: failed: AssertionError: rectangle-d128, rank 0: out of KV" in printed.err
    assert "| rectangle-d128 | unfused |" in printed.out


def test_frameworks_that_differ_fail(short_rounds, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "jax", replace(IMPLEMENTATIONS["flash2-torch"], twin="torch", ours=True))
    names = ["torch", "jax"]
    rows = run.measure(TINY, names, run.set_up(TINY, names, DEVICE), 1.0, 2)
    for row in rows[2:]:  # which of the results differs first depends on the GPU
        assert re.match(r"failed: AssertionError: (out|dq|dk|dv) is not that of torch bit for bit", row["status"])


def test_filters():
    names = list(IMPLEMENTATIONS)
    assert run.chosen(names, ["jax*", "unfused"]) == ["jax", "jax-hopper", "jax-fused", "unfused"]
    with pytest.raises(SystemExit, match="'nobody' matches none of torch, jax"):
        run.chosen(names, ["torch", "nobody"])


def test_cases_vary_one_thing_and_the_quick_ones_have_every_headline():
    quick = {case.name for case in CASES if case.tags & QUICK}
    assert {*report.HEADLINES, *report.SMALL, report.LONG} <= quick
    timed = [case for case in CASES + MASKS if case.tags & BENCH]
    assert len({case.name for case in timed}) == len(timed)
    assert len({replace(case, name="") for case in timed}) == len(timed)
    assert quick <= {case.name for case in timed}


def test_headlines_are_ratios_of_the_rows():
    rows = make_rows(report.HEADLINES, {"torch": (1, 3), "unfused": (4, 6)})
    rows += make_rows(["documents-d128"], {"torch": (2, 6)})
    gains, costs = report.headlines(rows, ["torch"])
    assert gains.endswith("unfused path: long rectangle 2.50x, T=2048 2.50x, 16x512 2.50x, 64x128 2.50x")
    assert costs.endswith("relative to the long rectangle: 64x128 1.00, real lengths 2.00")
    gains, costs = report.headlines([row for row in rows if row["case"] != report.LONG], ["torch"])
    assert "long rectangle not measured, T=2048 2.50x" in gains
    assert costs.endswith("64x128 not measured, real lengths not measured")


def test_table_and_what_is_missing():
    rows = make_rows(["one", "two"], {"torch": (2, 4)})
    rows += [missing_row(case, "flex", x, "failed: Oops: x") for case in ("one", "two") for x in report.DIRECTIONS]
    rows += [missing_row("two", "cudnn", x, "not available: y") for x in report.DIRECTIONS]
    *_, line = report.table(rows)
    cells = "2.000 | 50.0 % | – | 0 | 50 % | 0.100 | – | 4.000 | 50.0 % | – | 0 | 50 % | 0.100 | –"
    assert line == f"| two | torch | {cells} |"
    assert report.missing(rows) == ["flex: failed: Oops: x (all cases)", "cudnn: not available: y (two)"]


def test_the_table_of_who_wins():
    """CUDA graphs count where both have one, portable kernels where no kernel for Hopper was timed."""
    theirs = {"flash4-torch": (2, 6), "flash4-deterministic": (2, 9)}
    rows = make_rows(["long"], theirs | {"torch": (9, 9), "torch-hopper": (1, 6), "torch-fused": (9, 5)})
    rows += make_rows(["wide"], theirs | {"torch": (4, 12), "jax": (4.1, 11)})
    rows += make_rows(["alone"], {"torch": (4, 12)})
    for row in rows:
        if (row["case"], row["direction"], row["implementation"]) != ("wide", "forward", "torch"):
            row["graph_ms"] = row["ms"] / (
                4 if row["case"] == "long" and row["implementation"] == "torch-hopper" else 2
            )
    _, _, *lines = report.winners(rows)
    assert lines == [
        "| long | 4.00 | 3.00 | 1.20 |  | this library |",
        "| wide | 0.50 | 0.75 | 0.50 | +2.5 %, -8.3 % | FlashAttention-4 |",
    ]
    assert report.winners(make_rows(["alone"], {"torch": (4, 12)})) == []


def test_every_implementation_has_a_colour_of_its_own():
    assert len(set(report.COLOURS)) == len(report.COLOURS) >= len(IMPLEMENTATIONS)


@pytest.mark.parametrize(
    "command", ["run", "ranks", "lab.stress", "lab.revisions HEAD", "tune --kernel=forward --head-dim=64"]
)
def test_without_a_gpu_a_script_says_so(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="PyTorch sees no GPU"):
        importlib.import_module(f"bench.{sys.argv[0]}").main()


def test_rows_of_samples():
    assert report.summarise([9.0, 1.0, 3.0, 2.0, 4.0]) == {"ms": 3.0, "low_ms": 2.0, "high_ms": 4.0}
    assert [timing.calls_per_round(ms) for ms in (0.001, 1.0, 15.0, 600.0)] == [timing.MOST_CALLS, 20, 2, 2]


def test_calls_take_turns_with_several_inputs():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    timing.host_sample(calls, 7, lambda _: seen.append("waited"))
    assert seen == [0, 1, 2, 0, 1, 2, 0, "waited"]


def test_the_order_of_turns_changes_and_is_the_same_in_every_run():
    def run_order():
        seen = []
        samplers = {key: lambda key=key: seen.append(key) or key for key in range(4)}
        assert timing.in_turns(samplers, rounds=3) == {key: [key] * 3 for key in range(4)}
        return [tuple(seen[i : i + 4]) for i in range(0, 16, 4)]

    order = run_order()
    assert order == run_order()
    assert all(sorted(turns) == [0, 1, 2, 3] for turns in order)
    assert len(set(order)) > 1


def test_host_time_waits_between_calls():
    seen = []
    timing.host_ms(lambda: seen.append("call"), lambda _: seen.append("wait"))
    assert seen == ["call", "wait", *(["call"] * timing.HOST_CALLS + ["wait"]) * timing.HOST_BURSTS]


def test_plans_of_several_settings_stand_side_by_side(monkeypatch):
    """Each plans once under its own environment, and nothing stays behind."""

    def choose(kernel, *_):
        asked.append(kernel)
        return TileConfig(*map(int, run.os.environ["TILES"].split()))

    asked = []
    monkeypatch.setattr(operation, "choose_tiles", choose)
    tensors = timing.inputs(TINY, DEVICE)
    before = planner.current
    plannings = {tiles: Planning(TILES=tiles) for tiles in ("16 16 1 1", "32 16 1 1")}
    for _ in range(2):
        for planning in plannings.values():
            with planning:
                timing.torch_calls(TINY, 0, *tensors, backend=BACKEND).forward()
    assert planner.current is before
    assert "TILES" not in run.os.environ
    assert asked == [FORWARD] * 2
    for tiles, planning in plannings.items():
        (planned,) = [x for x in planning.planner.planned if x.kernel == FORWARD]
        assert planned.launches[0].constexprs["BLOCK_M"] == int(tiles[:2])
        assert not planning.takes_hopper_kernels
