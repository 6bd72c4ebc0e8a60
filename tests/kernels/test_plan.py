"""The framework-free plan: tile tables within their budgets, overrides, one launch for both frameworks, compilation."""

import itertools
import json
import sys
import types
from dataclasses import replace

import jax
import pytest
import torch

from tests.programs.compile_portable import PROBLEMS
from tests.support.commands import lines_of
from tests.support.problems import launches
from tests.support.problems import small_problem as problem
from zigzag_jax import launch as jax_launch
from zigzag_kernels import config, plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.config import Config
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import ArraySpec, make_problem, segment_table_shapes
from zigzag_torch import launch as torch_launch

FULL = make_call_spec(head_dim=64, backend="triton", causal=False)
TARGETS = {"sm_80": "8.0", "sm_86": "8.6", "sm_90": "9.0"}


ENTRIES = [
    (arch, {"16-bit": "bfloat16", "32-bit": "float32"}[width], kernel, head_dim)
    for arch, widths in config._TABLES.items()
    for width, kernels in widths.items()
    for kernel, entries in kernels.items()
    for head_dim in entries
]


def test_every_architecture_has_every_portable_kernel():
    kernels = set(config.KERNELS) - set(config.HOPPER_KERNELS)
    assert set(itertools.product(TARGETS, ("bfloat16", "float32"), kernels, config.HEAD_DIMS)) <= set(ENTRIES)


@pytest.mark.parametrize(("arch", "dtype", "kernel", "head_dim"), ENTRIES)
def test_every_table_entry_fits_its_budget(arch, dtype, kernel, head_dim):
    chosen = config.choose_config(kernel, head_dim, dtype, TARGETS[arch])
    assert config.fits(kernel, chosen, head_dim, dtype, TARGETS[arch]) is None
    assert config.choose_config(kernel, head_dim - 8, dtype, TARGETS[arch]) == chosen


def test_what_does_not_fit_is_named():
    large = Config(BLOCK_M=256, BLOCK_N=256, num_warps=4, num_stages=4)
    assert "shared memory" in config.fits("forward", large, 256, "bfloat16", "9.0")
    wide = Config(BLOCK_M=256, BLOCK_N=16, num_warps=1, num_stages=1)
    assert "registers" in config.fits("forward", wide, 64, "bfloat16", "9.0")


@pytest.mark.parametrize(
    ("target", "arch"),
    [("8.0", "sm_80"), ("8.6", "sm_86"), ("8.7", "sm_80"), ("8.9", "sm_86"), ("9.0", "sm_90"), ("10.0", "sm_90"),
     ("12.0", "sm_86")],
)  # fmt: skip
def test_which_table_a_gpu_uses(target, arch):
    assert config.architecture(target) == arch


@pytest.fixture
def override(tmp_path, monkeypatch):
    """A function that writes an override file and makes it the one in force."""

    def write(tables):
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps(tables))
        monkeypatch.setenv(config.OVERRIDE_VARIABLE, str(path))
        config._overrides.cache_clear()

    yield write
    config._overrides.cache_clear()


TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


def test_an_override_replaces_one_entry_alone(override):
    before = config.choose_config("backward_dq", 64, "bfloat16", "9.0")
    override({"sm_90": {"16-bit": {"forward": {"64": TILES}}}})
    assert config.choose_config("forward", 64, "bfloat16", "9.0") == Config(**TILES)
    assert config.choose_config("forward", 40, "float16", "9.0") == Config(**TILES)  # rounded up to 64
    assert config.choose_config("forward", 64, "bfloat16", "8.0") != Config(**TILES)
    assert config.choose_config("backward_dq", 64, "bfloat16", "9.0") == before


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"sm_70": {}}, "expected architecture .* got 'sm_70'"),
        ({"sm_90": {"16-bit": {"sideways": {}}}}, "expected kernel .* got 'sideways'"),
        ({"sm_90": {"8-bit": {}}}, "expected width .* got '8-bit'"),
        ({"sm_90": {"16-bit": {"forward": {"96": TILES}}}}, "expected head_dim .* got '96'"),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"BLOCK_M": 40}}}}}, "BLOCK_M: expected a multiple of 16"),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"BLOCK_M": 48}}}}}, "needs a power of two as BLOCK_M"),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"warps": 4}}}}}, "unexpected keyword argument 'warps'"),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"num_stages": 40}}}}}, "shared memory, the GPU has"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override, tables, message):
    override(tables)
    with pytest.raises(ValueError, match=message):
        config.choose_config("forward", 64, "bfloat16", "9.0")


@pytest.mark.parametrize(
    ("tiles", "changes", "together"),
    [(1, {}, 1), (127, {}, 1), (128, {}, 0), (95, {"window": 16}, 1), (96, {"window": 16}, 0),
     (1, {"call": FULL}, 0), (1, {"kv_layout": KVLayout.PEER}, 0)],
)  # fmt: skip
def test_heads_are_side_by_side_where_one_does_not_fill_a_gpu(tiles, changes, together):
    changed = replace(problem(), **changes)
    assert plan._ordered(changed, Config(64, 64, 4, 2), tiles).tiles_together == together
    assert plan._ordered(changed, Config(64, 64, 4, 2, tiles_together=4), tiles).tiles_together == 4


@pytest.mark.parametrize(("tokens", "together"), [(512, 1), (2**15, 0)])
def test_every_attention_kernel_follows_that_order(tokens, together):
    asked = problem(head_dim=128, tokens=tokens)
    asked = replace(asked, call=replace(asked.call, deterministic=False))
    made = [x for x in (*launches(asked), *plan._fused_launches(asked, asked.q_strides)) if "CAUSAL" in x.constexprs]
    assert [x.constexprs["TILES_TOGETHER"] for x in made] == [together] * 4
    assert all(x.grid[0] > 1 for x in made)


class Recorder:
    """Stands for a kernel: remembers how it was launched."""

    def __init__(self, kernel):
        self.fn = kernel.fn
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((grid, arguments, options))


def test_both_frameworks_hand_triton_the_same_launch(monkeypatch):
    """Source, grid, scalars, constants, warps and stages, as each launch site passes them on."""
    seen = []

    def triton_call(*arguments, kernel, grid, out_shape, num_warps, num_stages, input_output_aliases, **constexprs):
        seen.append((kernel, grid, arguments, tuple(out_shape), constexprs, num_warps, num_stages))
        return [jax.numpy.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
    for launch in launches(problem()):
        recorder = Recorder(launch.kernel)
        recorded = plan.Launch(**(vars(launch) | {"kernel": recorder}))
        empty = launch.in_place.values()
        torch_launch.run(recorded, *(None if name in empty else torch.zeros(1) for name in launch.inputs))
        outputs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in launch.outputs)
        jax_launch._compile(launch, outputs, tuple(jax.numpy.zeros(1) for _ in launch.inputs), {})

        ((torch_grid, torch_arguments, options),) = recorder.calls
        kernel, grid, arguments, out_shape, constexprs, num_warps, num_stages = seen.pop()
        n = len(launch.inputs)
        assert kernel is launch.kernel
        assert torch_grid == grid
        assert torch_arguments[n : n + len(launch.scalars)] == arguments[n:] == tuple(launch.scalars.values())
        assert [(tuple(x.shape), str(x.dtype)[6:]) for x in torch_arguments[n + len(launch.scalars) :]] == [
            (x.shape, str(x.dtype)) for x in out_shape
        ]
        assert options == constexprs | {"num_warps": num_warps, "num_stages": num_stages}
        assert num_warps == launch.num_warps


def test_every_kernel_compiles_within_its_shared_memory(tmp_path):
    """In a process of its own, for this one interprets."""
    assert lines_of("compile_portable", TRITON_CACHE_DIR=str(tmp_path)) == [
        f"{target} {head_dim} {dtype} {kernel}"
        for target, head_dim, dtype in PROBLEMS
        for kernel in (
            *("build_segments", "forward", "backward_delta"),
            *["backward_dkdv"] * (2 if config.sums_apart(head_dim, dtype, target) else 1),
            "backward_dq",
        )
    ]


@pytest.mark.parametrize(
    ("strides", "fits"), [((2**23, 1), True), ((2**24, 1), False), ((64, 2**29), True), ((64, 2**31), False)]
)
def test_rows_too_far_apart_for_a_tile_are_refused(strides, fits):
    """Offsets inside a tile are int32: a view with longer strides would be read in the wrong place."""
    kv = ArraySpec((64, 2, 64), "float16", (128, 64))
    q = ArraySpec((64, 8, 64), "float16", strides)
    call = make_call_spec(head_dim=64, backend="triton")
    arguments = {"sequences": 1, "world_size": 1, "target": "9.0"}
    if fits:
        made = make_problem(q, kv, kv, call, **arguments)
        plan._delta_launch(made, (512, 64), False, plan.WHOLE)
        return
    with pytest.raises(ValueError, match="q: expected strides"):
        make_problem(q, kv, kv, call, **arguments)
    with pytest.raises(ValueError, match="dout: expected strides"):
        plan._delta_launch(problem(), strides, False, plan.WHOLE)


def test_tables_have_room_for_all_entries():
    assert segment_table_shapes(3) == ((7, 8), (4, 12))
