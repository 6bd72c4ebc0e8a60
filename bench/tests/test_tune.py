"""The tuner's search with an invented clock, the files that it writes, and its timed pass on a CPU."""

import json

import pytest
import triton

from bench import timing, tune
from tests.support.cases import CASES, Case
from tests.support.machine import GPU
from tests.support.problems import hopper_problem as problem
from zigzag_kernels.families import choose_family, choose_tiles, family_of, kernels_by_name
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import Operation
from zigzag_kernels.tiles import override
from zigzag_kernels.tiles.config import TileConfig

DEVICE, BACKEND = ("cuda", None) if GPU else ("cpu", "interpret")
TINY = Case(name="tiny", world_size=4, lengths=(16,), head_dim=32, dtype="float16")
KERNELS = kernels_by_name()
FORWARD, DQ = KERNELS["forward"], KERNELS["backward_dq"]
BEST, USED, WRONG = (TileConfig(64, 64, warps, 2) for warps in (4, 8, 16))


def measure(tried):
    if tried == WRONG:
        raise AssertionError("tiny, rank 3:\nout is off")
    return {"a": 1.0, "b": 1.0} if tried == USED else {"a": 0.5, "b": 1.28}


def entry_of(tried):
    return tune.entry(DQ, 96, "float16", "9.0", tried)


def test_the_search_ranks_by_the_mean_and_keeps_what_failed():
    ticks = []
    trials = tune.search([USED, WRONG, BEST], measure, ticks.append)
    assert [trial.config for trial in trials] == [BEST, USED, WRONG]
    assert [trial.mean for trial in trials[:2]] == pytest.approx([0.8, 1])
    assert trials[-1].failure == "AssertionError: tiny, rank 3: out is off"
    assert [trial.config for trial in ticks] == [USED, WRONG, BEST]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_candidates_fit_and_have_what_is_shipped(kernel, head_dim):
    found = tune.candidates(kernel, head_dim, "bfloat16", "9.0")
    assert len(found) == len(set(found)) < 300
    assert all(family_of(kernel).fits(kernel, x, head_dim, "bfloat16", "9.0") is None for x in found)
    assert choose_tiles(kernel, head_dim, "bfloat16", "9.0") in found


def test_the_override_that_is_written_is_the_one_that_is_read(tmp_path, monkeypatch):
    """The new entry replaces the measured one, other entries stay, and a second file has all trials."""
    path = tmp_path / "tiles.json"
    other = tune.entry(FORWARD, 64, "bfloat16", "9.0", USED)
    path.write_text(json.dumps(tune.merged(other, entry_of(WRONG))))
    trials = tune.search([USED, WRONG, BEST], measure)
    tune.save(path, trials, entry_of, {"gpu": "made up"})
    monkeypatch.setenv(override.VARIABLE, str(path))
    assert choose_tiles(DQ, 128, "bfloat16", "9.0") == BEST
    assert choose_tiles(FORWARD, 64, "bfloat16", "9.0") == USED
    measured = json.loads((tmp_path / "tiles.measured.json").read_text())
    assert measured["machine"] == {"gpu": "made up"}
    assert [x["relative"] for x in measured["tried, best first"]] == [{"a": 0.5, "b": 1.28}, {"a": 1.0, "b": 1.0}, None]


def test_files_of_candidates_keep_the_override_in_force(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(tune.entry(FORWARD, 64, "bfloat16", "9.0", USED)))
    monkeypatch.setenv(override.VARIABLE, str(path))
    (written,) = tune.write_overrides(tmp_path, [BEST], entry_of).values()
    monkeypatch.setenv(override.VARIABLE, str(written))
    assert choose_tiles(DQ, 128, "bfloat16", "9.0") == BEST
    assert choose_tiles(FORWARD, 64, "bfloat16", "9.0") == USED


def test_a_pass_is_checked_and_timed_beside_the_one_in_use(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "ROUND_MS", 0)
    monkeypatch.setattr(tune, "GIVE_UP", 1e9)
    bench = tune.Bench(FORWARD, [TINY], DEVICE, BACKEND)
    assert bench.relative(None)["tiny"] > 0
    monkeypatch.setattr(tune, "GIVE_UP", 0)
    with pytest.raises(RuntimeError, match=r"tiny: .* of the time in use"):
        bench.relative(None)
    bench.expected["tiny"] = [2 * x for x in bench.expected["tiny"]]
    with pytest.raises(AssertionError, match="out of KV head 0 is off"):
        bench.relative(None)


def test_a_kernel_that_does_not_serve_is_not_tuned():
    with pytest.raises(RuntimeError, match="another kernel than hopper_forward serves"):
        tune.Bench(KERNELS["hopper_forward"], [TINY], DEVICE, BACKEND)


def test_each_kernel_is_tuned_in_its_own_pass_on_cases_that_it_serves():
    expected = {
        "forward": "forward", "backward_dkdv": "backward", "backward_dq": "backward", "hopper_forward_few": "forward",
        "hopper_dkdv": "backward", "hopper_dq_short": "backward", "hopper_fused": "backward",
    }  # fmt: skip
    assert {kernel: tune.Bench(KERNELS[kernel], []).direction for kernel in expected} == expected


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_cases_of_each_kernel_are_those_that_it_serves(head_dim, monkeypatch):
    """The fused one serves all of them."""
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    monkeypatch.setenv(HOPPER.variable, "1")
    served = {kernel: () for kernel in HOPPER.kernels if tune.is_deterministic(kernel)}
    for case in CASES:
        if case.name in tune.NAMES:
            asked = problem(case.tokens, head_dim, sequences=len(case.lengths), world_size=case.world_size)
            for operation in (Operation.FORWARD, Operation.DKDV, Operation.DQ):
                family = choose_family(asked, operation, asked.q_strides)
                served[family.choose_kernel(asked, operation)] += (case.name,)
    assert served == tune.SERVES


class FakeBench:
    """A clock by tiles: 256 rows are twice as fast as the tiles in use, 64 do not compile."""

    def __init__(self, kernel, cases):
        assert (kernel, {case.head_dim for case in cases}) == (FORWARD, {96})
        self.cases = cases

    def relative(self, tiles):
        rows = json.loads(tiles.read_text())["sm_90"]["16-bit"]["forward"]["128"]["BLOCK_M"]
        if rows == 64:
            raise RuntimeError("too many registers")
        return {case.name: 0.5 if rows == 256 else 1.0 for case in self.cases}


def test_the_whole_search(monkeypatch, tmp_path, capsys):
    tried = [TileConfig(rows, 64, 8, 2) for rows in (64, 256)]
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(timing, "require_gpu", lambda: "made up")
    monkeypatch.setattr(tune, "compile_all", lambda kernel, case, paths: None)
    monkeypatch.setattr(tune, "candidates", lambda *_: tried)
    monkeypatch.setattr(tune, "Bench", FakeBench)
    path = tmp_path / "tiles.json"
    arguments = ["--kernel", "forward", "--head-dim", "96", "--output", str(path)]
    assert tune.main(arguments) == 0
    assert json.loads(path.read_text())["sm_90"]["16-bit"]["forward"]["128"]["BLOCK_M"] == 256
    printed = capsys.readouterr().out
    assert "0.500 of the time in use: TileConfig(BLOCK_M=256" in printed
    assert "BLOCK_M=64" not in printed
    assert "3 configurations, 1 of which failed" in printed
    monkeypatch.setattr(FakeBench, "relative", lambda self, tiles: 1 / 0)
    path.unlink()
    assert tune.main(arguments) == 1
    assert not path.exists()
    with pytest.raises(SystemExit):
        tune.main(["--kernel", "hopper_fused", "--head-dim", "256"])
    assert "there is no hopper_fused for head_dim 256 on 9.0" in capsys.readouterr().err
