"""The kernels for Hopper: when they are taken, and that they compile within their budgets."""

import dataclasses

import pytest
import triton

from tests.support.commands import lines_of
from tests.support.hopper import needs_triton
from tests.support.problems import hopper_problem as problem
from tests.support.problems import launches_of, serving
from zigzag_kernels import heuristics, plan
from zigzag_kernels.families import choose_tiles
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import Layout, Operation
from zigzag_kernels.plan.grid import count_heads_together
from zigzag_kernels.tiles.config import TileConfig
from zigzag_kernels.tiles.override import kernel_name
from zigzag_kernels.tiles.sm_90 import SM_90

PORTABLE = ("backward_dkdv", "backward_dq")
DOUT_STRIDES = (4096, 128)


@pytest.fixture(autouse=True)
def _unforced(monkeypatch):
    """Rules are those without the variable, also where a run forces or forbids the kernels for all other tests."""
    monkeypatch.delenv(HOPPER.variable, raising=False)


def forward(asked):
    return serving(asked, Operation.FORWARD)


def pair(asked, dout_strides=DOUT_STRIDES):
    return tuple(serving(asked, operation, dout_strides) for operation in (Operation.DKDV, Operation.DQ))


def fused(asked):
    asked = dataclasses.replace(asked, call=dataclasses.replace(asked.call, deterministic=False))
    return serving(asked, Operation.FUSED_BACKWARD, DOUT_STRIDES) == "hopper_fused"


def test_the_rules_that_take_them(monkeypatch):
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    for value in (None, "1"):
        if value:
            monkeypatch.setenv(HOPPER.variable, value)
        assert forward(problem()) == "hopper_forward"
        assert pair(problem()) == ("hopper_dkdv", "hopper_dq")
        assert forward(problem(tokens=2048)) == "hopper_forward_few"
        assert pair(problem(tokens=2048)) == ("hopper_dkdv", "hopper_dq_few")
        assert forward(problem(sequences=64)) == "hopper_forward_short"
        assert forward(problem(sequences=64, head_dim=64)) == ("hopper_forward_short" if value else "forward")
        short = pair(problem(sequences=64, head_dim=64))
        assert short == (("hopper_dkdv_short", "hopper_dq_short") if value else PORTABLE)
        assert pair(problem(sequences=16, head_dim=64)) == ("hopper_dkdv", "hopper_dq_few")
        shorter = pair(problem(sequences=32, head_dim=64))
        assert shorter == ("hopper_dkdv" if value else "backward_dkdv", "hopper_dq_few")
        assert pair(problem(sequences=64)) == ("hopper_dkdv_short", "hopper_dq_short")
        assert fused(problem())
        assert fused(problem(head_dim=64))
        assert fused(problem(sequences=16, head_dim=64))
        assert fused(problem(sequences=32, head_dim=64)) == bool(value)
        assert fused(problem(tokens=16384, world_size=1, sequences=4, head_dim=64))
        assert fused(problem(tokens=16384, world_size=1, sequences=5, head_dim=64)) == bool(value)
        for head_dim in (64, 128):
            assert fused(problem(sequences=64, head_dim=head_dim)) == bool(value)
        for head_dim in (136, 256):
            assert forward(problem(head_dim=head_dim)) == "hopper_forward"
            assert pair(problem(head_dim=head_dim)) == ("hopper_dkdv", "hopper_dq")
            assert not fused(problem(head_dim=head_dim))
            short = problem(sequences=64, head_dim=head_dim)
            assert forward(short) == "hopper_forward_short"
            assert pair(short) == ("hopper_dkdv_short", "hopper_dq_short")
        # dK/dV alone reads q and dout by the copy engine.
        assert pair(problem(), (4100, 128)) == ("backward_dkdv", "hopper_dq")
        assert pair(problem(q_stride=4100)) == ("backward_dkdv", "hopper_dq")
        for cannot in (
            {"head_dim": 32}, {"dtype": "float32"}, {"target": "8.0"}, {"target": "10.0"},
            {"gluon": False}, {"stride": 1028},
        ):  # fmt: skip
            assert forward(problem(**cannot)) == "forward", cannot
            assert pair(problem(**cannot)) == PORTABLE, cannot
            assert not fused(problem(**cannot)), cannot
    monkeypatch.setenv(HOPPER.variable, "0")
    assert forward(problem()) == "forward"
    monkeypatch.setenv(HOPPER.variable, "yes")
    with pytest.raises(ValueError, match="ZIGZAG_HOPPER: expected 0 or 1, got 'yes'"):
        forward(problem())
    monkeypatch.delenv(HOPPER.variable)
    for release, kernel in (("3.7.1", "hopper_forward"), ("3.9.0", "hopper_forward"), ("3.10.0", "forward")):
        monkeypatch.setattr(triton, "__version__", release)
        assert forward(problem()) == kernel, release


def test_masks_and_caps_that_take_other_kernels_or_tiles(monkeypatch):
    """Where rows see few keys neither the fused kernel nor tiles of 192 keys pay; caps leave no registers for these."""
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")

    def asked(head_dim=128, tokens=8192, **options):
        plain = problem(head_dim=head_dim, tokens=tokens)
        return dataclasses.replace(plain, call=dataclasses.replace(plain.call, **options))

    def keys(options):
        (launch,) = launches_of(asked(64, **options), Operation.DKDV)
        return launch.constexprs["BLOCK_N"]

    narrow, chunks = {"window_size": (127, -1)}, {"attention_chunk": 255}
    both_sides = {"window_size": (100, 154), "causal": False}
    for options in (narrow, chunks, both_sides):
        assert pair(asked(**options))[0] == "hopper_dkdv"
        assert pair(asked(64, **options))[0] == "backward_dkdv"
        assert not fused(asked(**options))
        assert not fused(asked(64, **options))
    for options in ({"has_lengths": True}, {"layout": Layout.ROW}, {"softcap": 30.0}):
        assert fused(asked(**options)) == ("softcap" not in options)
        assert not fused(asked(64, **options))
        assert pair(asked(64, **options))[0] == "hopper_dkdv"
    few = {"window_size": (255, -1)}, {"window_size": (1023, -1)}, {"attention_chunk": 1024}, {"softcap": 30.0}
    many = {}, {"window_size": (1024, -1)}, {"window_size": (255, -1), "causal": False}, {"has_lengths": True}
    assert [keys(options) for options in (*few, *many)] == [128] * len(few) + [192] * len(many)


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (127, -1)},
        {"softcap": 30.0},
        {"has_sinks": True},
        {"return_max_logits": True},
        {"has_lengths": True},
    ],
)
def test_forward_and_dq_serve_all_options(options, monkeypatch):
    monkeypatch.delenv(HOPPER.variable, raising=False)
    plain = problem()
    asked = dataclasses.replace(plain, call=dataclasses.replace(plain.call, **options))
    for operation, name in ((Operation.FORWARD, "attention_forward"), (Operation.DQ, "backward_dq")):
        assert launches_of(plain, operation)[0].kernel.fn.__name__ == f"{name}_hopper"
        assert launches_of(asked, operation)[0].kernel.fn.__name__ == f"{name}_hopper"
        monkeypatch.setenv(HOPPER.variable, "0")
        assert launches_of(asked, operation)[0].kernel.fn.__name__ == name
        monkeypatch.delenv(HOPPER.variable)


@needs_triton
def test_tiles_of_query_rows_under_narrow_windows(monkeypatch):
    """They walk through few blocks: tiles of short sequences, and several heads a program in the forward."""
    monkeypatch.setenv(HOPPER.variable, "1")

    def served(head_dim, **options):
        plain = problem(head_dim=head_dim, tokens=32768, world_size=1)
        asked = dataclasses.replace(plain, call=dataclasses.replace(plain.call, **options))
        found = [launches_of(asked, operation)[0].constexprs for operation in (Operation.FORWARD, Operation.DQ)]
        return [(x["BLOCK_M"], x["BLOCK_N"], x["HEADS_TOGETHER"]) for x in found]

    assert served(64, window_size=(127, -1)) == [(256, 64, 8), (192, 64, 4)]
    assert served(128, window_size=(1023, -1)) == [(128, 128, 4), (128, 128, 1)]
    assert served(128, attention_chunk=1024) == [(128, 128, 4), (128, 128, 1)]
    assert served(128, window_size=(4095, -1)) == [(128, 128, 4), (128, 128, 1)]
    assert served(128, window_size=(32767, -1)) == served(128, softcap=30.0) == served(128)
    assert served(64, has_sinks=True, return_max_logits=True) == served(64)
    wide = {"window_size": (127, -1), "causal": False}  # no limit on the other side
    assert served(128, **wide) == served(128)


@needs_triton
def test_programs_of_moderate_walks_take_several_heads(monkeypatch):
    """The forward, and dQ at head_dim 64; neither where keys are many, nor where few programs would be left."""
    monkeypatch.setenv(HOPPER.variable, "1")

    def heads(head_dim, tokens, world_size=1, sequences=1, **options):
        plain = problem(head_dim=head_dim, tokens=tokens, world_size=world_size, sequences=sequences)
        asked = dataclasses.replace(plain, call=dataclasses.replace(plain.call, **options))
        return [
            launches_of(asked, operation)[0].constexprs["HEADS_TOGETHER"]
            for operation in (Operation.FORWARD, Operation.DQ)
        ]

    assert heads(128, 16384) == [4, 1]
    assert heads(128, 32768) == [4, 1]
    assert heads(128, 65536) == [1, 1]
    assert heads(128, 65536, window_size=(4095, -1)) == [4, 1]
    assert heads(128, 8192, world_size=8) == [1, 1]
    assert heads(128, 8192) == [4, 1]
    assert heads(64, 16384) == [4, 4]
    assert heads(64, 8192) == [2, 1]
    assert heads(64, 8192, world_size=8) == [1, 1]
    assert heads(64, 32768) == [4, 1]
    assert heads(128, 16384, sequences=0) == [4, 1]


def test_tiles_without_room_for_the_queries_of_two_heads_take_one(monkeypatch):
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    asked = problem(head_dim=64, tokens=32768, world_size=1)
    narrow = dataclasses.replace(asked, call=dataclasses.replace(asked.call, window_size=(127, -1)))
    roomy, full = TileConfig(192, 128, 4, 3), TileConfig(192, 128, 4, 6)
    assert HOPPER.fit_tiles(narrow, Operation.FORWARD, roomy).heads_together > 1
    assert HOPPER.fit_tiles(narrow, Operation.FORWARD, full).heads_together == 1


@needs_triton
def test_blocks_of_the_fused_kernel_have_more_rows_where_registers_have_room(monkeypatch):
    monkeypatch.setenv(HOPPER.variable, "1")

    def rows(head_dim, **options):
        plain = problem(head_dim=head_dim, deterministic=False)
        asked = dataclasses.replace(plain, call=dataclasses.replace(plain.call, **options))
        return launches_of(asked, Operation.FUSED_BACKWARD)[1].constexprs["BLOCK_M"]

    assert [rows(40), rows(64), rows(64, softcap=30.0), rows(72), rows(128)] == [128, 128, 64, 64, 64]
    monkeypatch.setenv(rules.TURNS, "1")
    assert [rows(64, deterministic=True), rows(64, deterministic=True, softcap=30.0)] == [128, 64]
    kernel = HOPPER.choose_kernel(problem(), Operation.FUSED_BACKWARD)
    for rows_of_block, refused in ((32, "BLOCK_M 64 or 128"), (64, None), (128, None)):
        tried = TileConfig(rows_of_block, 128, 4, 2)
        assert HOPPER.fits(kernel, tried, 64, "bfloat16", "9.0") == refused
    assert "shared memory" in HOPPER.fits(kernel, tried, 72, "bfloat16", "9.0")


@needs_triton
def test_one_kernel_has_the_whole_backward_where_bits_may_differ_or_walks_are_long():
    one, two = ["hopper_fused"], ["hopper_dkdv", "hopper_dq"]
    for deterministic, tokens, expected in ((True, 4096, two), (False, 4096, one), (True, 8192, one)):
        step = plan.plan_step(problem(tokens=tokens, deterministic=deterministic))
        names = [kernel_name(planned.kernel) for planned in step if planned.kernel]
        assert names == ["hopper_forward", *expected]
    windows = plan.plan_step(problem(deterministic=False), part=plan.Part(dtype="float32"))
    assert [planned.kernel.operation for planned in windows[3:]] == [Operation.DKDV, Operation.DQ]


def which_read_by_the_copy_engine(asked, dout_strides):
    """{first result: whether its kernel is one for Hopper} of the kernels that a forward and a backward pass launch."""
    found = {}

    def run(launch, *_):
        if "CAUSAL" in launch.constexprs:
            found[launch.outputs[0].name] = launch.scratch > 0
        return (None,) * len(launch.outputs)

    plan.forward(run, asked, *[None] * 4)
    plan.backward(run, asked, *[None] * 6, dlse=None, segments=None, sequences=None, dout_strides=dout_strides)
    return found


@pytest.mark.parametrize("strides", [(4100, 128), (0, 128), (4096, 132), (4096, 0)], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_rows_that_the_copy_engine_cannot_address_are_left_to_the_portable_kernels(name, strides, monkeypatch):
    """It wants multiples of 16 bytes, and no row twice; dQ and out read q and dout without it."""
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    given = {f"{x}_strides": getattr(problem(), f"{x}_strides") for x in "qkv"} | {"dout_strides": DOUT_STRIDES}
    given[f"{name}_strides"] = strides
    dout_strides = given.pop("dout_strides")
    kept = name in ("q", "dout")
    for deterministic in (True, False):
        asked = dataclasses.replace(problem(sequences=3, deterministic=deterministic), **given)
        assert which_read_by_the_copy_engine(asked, dout_strides) == {"out": kept, "dk": False, "dq": kept}


def test_how_many_heads_a_program_takes(monkeypatch):
    """What the table says of short sequences, but no number that does not divide the window, leaves too few programs,
    or whose keys the copy engine cannot take for columns of one row."""
    table = TileConfig(128, 64, 4, 4, heads_together=8)

    def heads(tiles, table=table, **shapes):
        return count_heads_together(problem(**shapes), table, tiles)

    enough = heuristics.MANY_PROGRAMS
    assert [heads(tiles) for tiles in (enough, enough // 2, enough // 4, enough // 8, 1)] == [8, 4, 2, 1, 1]
    assert heads(enough, TileConfig(128, 64, 4, 4)) == 1
    assert heads(enough, TileConfig(128, 64, 4, 4, heads_together=6)) == 2
    assert heads(enough, head_dim=96) == 1
    for name in ("k_strides", "v_strides"):
        apart = dataclasses.replace(problem(), **{name: (2048, 256)})
        assert count_heads_together(apart, table, enough) == 1
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    (launch,) = launches_of(problem(sequences=64), Operation.FORWARD)
    assert launch.constexprs["HEADS_TOGETHER"] == 8
    assert launch.grid == (8192 * 4 // 128 + 2 * 64 + 1, 1, 1)  # one head's tiles, whose programs take all eight


@pytest.mark.parametrize(
    ("kernel", "head_dim"),
    [(kernel, dim) for kernel in HOPPER.kernels for dim in SM_90.tiles["16-bit"][kernel]],
    ids=lambda x: x if isinstance(x, int) else kernel_name(x),
)
def test_one_stage_is_refused(kernel, head_dim):
    """A consumer waits for a block while it has the one before: on a GPU it would wait for ever."""
    shipped = choose_tiles(kernel, head_dim, "bfloat16", "9.0")
    for stages, refused in ((1, "2 or more as num_stages"), (2, None)):
        tried = dataclasses.replace(shipped, num_stages=stages)
        assert HOPPER.fits(kernel, tried, head_dim, "bfloat16", "9.0") == refused


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("head_dim", [256, 128, 64])
def test_they_compile_without_spills_within_their_memory(head_dim, tmp_path):
    """In a process of its own, for this one may interpret."""
    names = lines_of("compile_hopper", str(head_dim), TRITON_CACHE_DIR=str(tmp_path), **{HOPPER.variable: "1"})
    if triton.__version__.startswith("3.6."):
        expected = {kernel_name(kernel) for kernel in HOPPER.kernels if head_dim in SM_90.tiles["16-bit"][kernel]}
    else:
        plain = {"hopper_forward", "hopper_dkdv", "hopper_dq", "hopper_fused"}
        windows = {"hopper_forward_few", "hopper_dkdv", "hopper_dq_few"}
        expected = {64: plain, 128: plain | windows, 256: windows}[head_dim]
    assert set(names) == expected
