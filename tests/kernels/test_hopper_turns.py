"""When tiles of keys of the fused backward kernel take turns, for which programs they wait, and where counters lie."""

import dataclasses
import itertools
import math

import pytest
import triton

from tests.support.device_code import in_numpy
from tests.support.hopper import needs_triton
from tests.support.problems import hopper_problem, launches_of, serving
from zigzag_kernels import plan
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import Layout, Operation
from zigzag_kernels.plan import operation


@pytest.fixture(autouse=True)
def _unforced(monkeypatch):
    for name in (HOPPER.variable, rules.TURNS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("kv_heads", "side"), [(8, 1), (8, 2), (8, 4), (6, 6), (1, 1)])
def test_a_tile_waits_only_for_programs_that_start_before_it(kv_heads, side):
    from zigzag_kernels.hopper import turns

    tiles = 7
    place = in_numpy(turns.tile_and_head_side_by_side)
    place.__globals__["gl"].num_programs = lambda _: tiles * kv_heads
    programs = {}
    for number in range(tiles * kv_heads):
        place.__globals__["gl"].program_id = lambda _, number=number: number
        programs[place(kv_heads, side)] = number
    assert programs.keys() == {*itertools.product(range(tiles), range(kv_heads))}
    for (tile, head), number in programs.items():
        assert tile == 0 or programs[tile - 1, head] == number - side


def fused(asked, deterministic=True):
    """Whether the backward pass is one kernel rather than two."""
    call = dataclasses.replace(asked.call, deterministic=deterministic)
    return serving(dataclasses.replace(asked, call=call), Operation.FUSED_BACKWARD) == "hopper_fused"


def test_the_rules_by_which_tiles_take_turns(monkeypatch):
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    long, one = hopper_problem(8192), hopper_problem(8192, world_size=1)
    short = hopper_problem(4096), hopper_problem(16384, world_size=1, sequences=4)
    few_heads = dataclasses.replace(hopper_problem(32768), heads=4, kv_heads=1, window=1)
    few_programs = dataclasses.replace(hopper_problem(16384, world_size=1), heads=8, kv_heads=2, window=2)
    capped = dataclasses.replace(long, call=dataclasses.replace(long.call, softcap=30.0))
    slower = few_heads, few_programs, *short, capped
    assert all(fused(asked) for asked in (long, one))
    for options in ({"window_size": (1023, -1)}, {"has_lengths": True}, {"layout": Layout.ROW}):
        slower += (dataclasses.replace(long, call=dataclasses.replace(long.call, **options)),)
    cannot = [hopper_problem(8192, **other) for other in ({"head_dim": 256}, {"dtype": "float32"}, {"stride": 1028})]
    assert not any(fused(asked) for asked in slower)
    monkeypatch.setenv(HOPPER.variable, "1")
    assert fused(long)
    assert not any(fused(asked) for asked in (*slower, *cannot))
    monkeypatch.delenv(HOPPER.variable)
    monkeypatch.setenv(rules.TURNS, "1")
    assert all(fused(asked) for asked in (long, one, *slower))
    assert not any(fused(asked) for asked in cannot)
    monkeypatch.setenv(rules.TURNS, "0")
    assert not any(fused(asked) for asked in (long, one))
    assert fused(long, deterministic=False)
    monkeypatch.setenv(rules.TURNS, "")
    with pytest.raises(ValueError, match="ZIGZAG_TURNS: expected 0 or 1, got ''"):
        fused(long)


def test_the_rules_by_which_tiles_of_small_heads_take_turns(monkeypatch):
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    four = hopper_problem(16384, 64, world_size=1, sequences=4)
    one, local = hopper_problem(8192, 64, world_size=1), hopper_problem(8192, 64)
    assert all(fused(asked) for asked in (four, one, local))
    # Two heads, as three are an odd number, run side by side on walks of twice the length.
    six_heads = [dataclasses.replace(asked, heads=24, kv_heads=6, window=6) for asked in (four, local)]
    assert [fused(asked) for asked in six_heads] == [False, True]
    # Many heads of a group make long walks of short sequences, which were not measured.
    short = dataclasses.replace(hopper_problem(16384, 64, world_size=1, sequences=8), heads=128)
    fewer = hopper_problem(16384, 64, world_size=1, sequences=5)
    few_programs = dataclasses.replace(one, heads=16, kv_heads=4, window=4)
    capped = dataclasses.replace(local, call=dataclasses.replace(local.call, softcap=30.0))
    window = dataclasses.replace(local, window=4)
    ranged = dataclasses.replace(local, call=dataclasses.replace(local.call, window_size=(1023, -1)))
    slower = short, fewer, few_programs, capped, window, ranged, hopper_problem(2048, 64)
    assert not any(fused(asked) for asked in slower)
    monkeypatch.setenv(rules.TURNS, "1")
    assert all(fused(asked) for asked in slower)


@needs_triton
def test_one_writer_takes_blocks_of_128_rows_in_turns_and_two_take_blocks_of_64(monkeypatch):
    monkeypatch.setenv(rules.TURNS, "1")
    made = {}
    for head_dim in (64, 72):
        asked = hopper_problem(512, head_dim)
        for name, softcap in (("plain", 0.0), ("capped", 30.0)):
            call = dataclasses.replace(asked.call, softcap=softcap)
            _, launch, _ = launches_of(dataclasses.replace(asked, call=call), Operation.FUSED_BACKWARD)
            made[head_dim, name] = [launch.constexprs[key] for key in ("BLOCK_M", "WRITERS", "SIDE")]
    two = [64, 2]
    assert made == {
        (64, "plain"): [128, 1, 4], (64, "capped"): [*two, 4], (72, "plain"): [*two, 2], (72, "capped"): [*two, 2],
    }  # fmt: skip


@needs_triton
def test_the_rules_by_which_tiles_take_turns_where_any_order_is_allowed(monkeypatch):
    def side(tokens, **other):
        asked = hopper_problem(tokens, deterministic=False, **other)
        return launches_of(asked, Operation.FUSED_BACKWARD)[1].constexprs["SIDE"]

    assert [side(32768), side(16384), side(32768, sequences=2), side(32768, head_dim=64)] == [2, 0, 0, 0]
    monkeypatch.setenv(rules.TURNS, "1")
    assert side(512) == 2
    monkeypatch.setenv(rules.TURNS, "0")
    assert side(32768) == 0


def test_the_rule_by_which_any_order_is_taken_under_a_window(monkeypatch):
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")

    def taken(head_dim=128, sequences=1, world_size=1, **options):
        asked = hopper_problem(16384, head_dim, sequences=sequences, world_size=world_size)
        call = dataclasses.replace(asked.call, **{"window_size": (4095, -1)} | options)
        return fused(dataclasses.replace(asked, call=call), deterministic=False)

    assert all((taken(), taken(96), taken(sequences=4), taken(window_size=(8191, -1))))
    assert not any((taken(64), taken(sequences=5), taken(world_size=2), taken(window_size=(4094, -1))))
    others = {"softcap": 30.0}, {"attention_chunk": 8192}, {"has_lengths": True}, {"causal": False}
    assert not any(taken(**options) for options in others)
    assert not taken(causal=False, window_size=(4095, 4095))


def launches_between_ranks(asked, deterministic):
    """The launches that compute the gradients of a window of one KV head."""
    call = dataclasses.replace(asked.call, deterministic=deterministic)
    asked = dataclasses.replace(asked, call=call, window=1)
    return operation.make_fused_window(asked, plan.Part(1, dtype="float32"), asked.q_strides).launches


def gradients_of(asked, window, **options):
    """The operations that compute the gradients of windows of `window` KV heads between ranks."""
    call = dataclasses.replace(asked.call, **options)
    part = plan.Part(window, dtype="float32")
    step = plan.plan_step(dataclasses.replace(asked, call=call, window=window), part=part)
    return [planned.kernel.operation for planned in step if planned.kernel][1:]


@needs_triton
def test_the_rules_by_which_one_kernel_computes_a_window(monkeypatch):
    one, two = [Operation.FUSED_BACKWARD], [Operation.DKDV, Operation.DQ]
    long, longer = hopper_problem(32768), hopper_problem(65536)
    assert gradients_of(longer, 1) == gradients_of(longer, 2) == gradients_of(long, 2) == one
    assert gradients_of(long, 1) == two  # one head alone has no other beside it while its programs wait
    assert gradients_of(longer, 8) == two  # nothing hides the transfer of a single window
    for asked in (hopper_problem(16384), hopper_problem(32768, sequences=2)):
        assert gradients_of(asked, 2) == gradients_of(asked, 2, deterministic=False) == two
    in_turns = [launches_between_ranks(longer, deterministic)[1].constexprs["SIDE"] for deterministic in (True, False)]
    assert in_turns == [1, 1]  # between ranks gradients repeat, whatever is asked for
    beside_whole_documents = dataclasses.replace(longer, first_row=4096)
    assert gradients_of(beside_whole_documents, 1) == two
    assert gradients_of(longer, 1, window_size=(1023, -1)) == two
    assert gradients_of(hopper_problem(65536, head_dim=64), 4) == two
    monkeypatch.setenv(rules.TURNS, "1")
    assert gradients_of(hopper_problem(512), 1) == one
    assert gradients_of(hopper_problem(512), 8) == two
    monkeypatch.setenv(rules.TURNS, "0")
    assert gradients_of(longer, 1) == two


@needs_triton
def test_sums_and_counters_of_a_window_are_of_its_heads_alone(monkeypatch):
    monkeypatch.setenv(rules.TURNS, "1")
    asked = dataclasses.replace(hopper_problem(512), window=2)
    clear, fused, finish = launches_of(asked, Operation.FUSED_BACKWARD, plan.Part(6, dtype="float32"))
    assert math.prod(clear.outputs[0].shape) == 512 * 8 * (128 + 1) == 512 * clear.constexprs["ROW"]
    assert {output.name: output.dtype for output in fused.outputs} == dict.fromkeys(("dk", "dv", "sums"), "float32")
    assert fused.outputs[0].shape == (8 * 512, 2, 128)
    (dq,) = finish.outputs
    assert (dq.shape, dq.dtype, finish.in_place) == ((512, 32, 128), "bfloat16", {"dq": "into_dq"})
    assert finish.scalars["first_kv_head"] == fused.scalars["first_kv_head"] == 6


@needs_triton
def test_counters_lie_behind_the_sums_of_dq_and_are_cleared_with_them(monkeypatch):
    monkeypatch.setenv(rules.TURNS, "1")
    asked = hopper_problem(512)
    clear, fused, finish = launches_of(asked, Operation.FUSED_BACKWARD)
    (sums,) = clear.outputs
    assert sums == fused.outputs[2]
    assert math.prod(sums.shape) == 512 * 32 * (128 + 1) == 512 * clear.constexprs["ROW"]
    assert clear.grid[0] * clear.constexprs["BLOCK"] >= math.prod(sums.shape)
    assert fused.constexprs["SIDE"] == 2
    assert fused.grid[0] % 8 == 0
    assert finish.outputs[0].shape == (512, 32, 128)
    monkeypatch.setenv(rules.TURNS, "0")
    clear, fused, _ = launches_of(hopper_problem(512, deterministic=False), Operation.FUSED_BACKWARD)
    assert (clear.outputs[0].shape, fused.constexprs["SIDE"]) == ((512, 32, 128), 0)
    names = [planned.kernel.operation for planned in plan.plan_step(asked) if planned.kernel]
    assert names[1:] == [Operation.DKDV, Operation.DQ]
