"""The framework-free plan: the order of tiles, one launch for both frameworks, and that its kernels compile."""

import sys
import types
from dataclasses import replace

import jax
import pytest
import torch

from tests.support.commands import lines_of
from tests.support.planners import RememberingPlanner
from tests.support.problems import launches, launches_of
from tests.support.problems import small_problem as problem
from zigzag_jax import launch as jax_launch
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import KVLayout, Operation
from zigzag_kernels.plan.grid import order_tiles
from zigzag_kernels.plan.operation import make_operation
from zigzag_kernels.portable.family import PORTABLE, sums_apart
from zigzag_kernels.problem import ArraySpec, make_problem, segment_table_shapes
from zigzag_kernels.segments.columns import SEGMENT_FIELDS, SEQUENCE_FIELDS
from zigzag_kernels.tiles.config import TileConfig
from zigzag_torch import launch as torch_launch

FULL = make_call_spec(head_dim=64, backend="triton", causal=False)
IN_ROWS = make_call_spec(head_dim=64, backend="triton", layout="row")
IN_CHUNKS = make_call_spec(head_dim=64, backend="triton", layout="document")


@pytest.mark.parametrize(
    ("tiles", "changes", "together"),
    [(1, {}, 1), (127, {}, 1), (128, {}, 0), (95, {"window": 16}, 1), (96, {"window": 16}, 0),
     (1, {"call": FULL}, 0), (1, {"kv_layout": KVLayout.PEER}, 0)],
)  # fmt: skip
def test_heads_are_side_by_side_where_one_does_not_fill_a_gpu(tiles, changes, together):
    changed, config = replace(problem(), **changes), TileConfig(64, 64, 4, 2)
    for operation in Operation:
        assert order_tiles(changed, operation, config, tiles).tiles_together == together
    config = replace(config, tiles_together=4)
    assert order_tiles(changed, Operation.DKDV, config, tiles).tiles_together == 4


@pytest.mark.parametrize(
    ("changes", "operation", "together"),
    [({}, "dkdv", 1), ({}, "dq", 0), ({}, "forward", 0), ({}, "fused_backward", 0), ({"sequences": 7}, "dkdv", 0),
     ({"tokens": 2**14}, "dkdv", 0), ({"window": 32}, "dkdv", 0), ({"call": IN_CHUNKS}, "dkdv", 0),
     ({"kv_layout": KVLayout.PEER}, "dkdv", 0), ({"kv_layout": KVLayout.HALO}, "dkdv", 0)],
)  # fmt: skip
def test_heads_are_side_by_side_where_a_rank_sees_few_keys_of_packed_rows(changes, operation, together):
    """8 documents in rows of 8 ranks, 8192 tokens each: 64 tiles of keys and 9 more for ends of documents."""
    asked = replace(problem(tokens=2**13, world_size=8), call=IN_ROWS, sequences=8)
    config = TileConfig(64, 128, 4, 2)
    assert order_tiles(replace(asked, **changes), Operation(operation), config, 1024).tiles_together == together


@pytest.mark.parametrize(
    ("changes", "operation", "together"),
    [({}, "dkdv", 1), ({"sequences": 2}, "dkdv", 1), ({"sequences": 1}, "dkdv", 0), ({"sequences": 9}, "dkdv", 0),
     ({"window": 12}, "dkdv", 0), ({"call": FULL}, "dkdv", 0), ({"world_size": 2}, "dkdv", 0),
     ({"kv_layout": KVLayout.CONTIGUOUS}, "dkdv", 0), ({}, "dq", 0), ({}, "forward", 0), ({}, "fused_backward", 0)],
)  # fmt: skip
def test_heads_are_side_by_side_where_each_of_several_sequences_has_heavy_tiles(changes, operation, together):
    """8 sequences of 2048 tokens on one device, 8 KV heads."""
    asked = replace(problem(tokens=2**14, world_size=1), sequences=8, window=8)
    config = TileConfig(64, 128, 4, 2)
    assert order_tiles(replace(asked, **changes), Operation(operation), config, 137).tiles_together == together


@pytest.mark.parametrize(
    ("tokens", "sequences", "stride"), [(2**14, 1, 4), (2**14, 8, 4), (2**14, 16, 8), (2**16, 8, 1), (2**10, 1, 8)]
)
def test_a_gather_brings_the_fewest_heads_that_fill_a_gpu_and_keep_it_busy(tokens, sequences, stride):
    """On 8 ranks: 2**16 query rows, and with the mean length of a sequence 2**30 scores."""
    sizes = types.SimpleNamespace(rows=tokens, heads=8, kv_heads=8, world_size=8, sequences=sequences)
    assert choose_heads_k_stride(None, sizes) == stride
    assert choose_heads_k_stride(2, sizes) == 2


@pytest.mark.parametrize(("tokens", "together"), [(512, 1), (2**15, 0)])
def test_every_attention_kernel_follows_that_order(tokens, together, monkeypatch):
    monkeypatch.setenv(HOPPER.variable, "1")
    asked = problem(head_dim=128, tokens=tokens)
    fused = replace(asked, call=replace(asked.call, deterministic=False), gluon=True)
    every = *launches(asked), *launches_of(fused, Operation.FUSED_BACKWARD)
    made = [x for x in every if "CAUSAL" in x.constexprs]
    assert [x.constexprs["TILES_TOGETHER"] for x in made] == [together] * 4
    assert all(x.grid[0] > 1 for x in made)


def test_equal_problems_are_planned_once():
    """A call makes a problem of its own each time, and finds the plans of the one before."""

    def run(launch, *_):
        launched.append(launch)
        return launch.outputs

    planner, launched = RememberingPlanner(), []
    for _ in range(2):
        with plan.use_planner(planner):
            out, lse = plan.forward(run, problem(), "q", "k", "v", "segments")
            tables = {"segments": "segments", "sequences": "sequences"}
            plan.backward(run, problem(), "q", "k", "v", out, lse, "dout", dlse=None, **tables, dout_strides=(512, 64))
    assert len(planner.launches) == 4
    assert launched == 2 * planner.launches


@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.DKDV, Operation.DQ])
def test_no_operation_is_planned_for_an_old_gpu(operation):
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or newer, got 7\.5"):
        make_operation(replace(problem(), target="7.5"), operation, plan.WHOLE, problem().q_strides)


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
        jax_launch.run(launch, *(None if name in empty else jax.numpy.zeros(1) for name in launch.inputs))

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "head_dim", "dtype", "call"),
    [
        ("9.0", 128, "bfloat16", "plain"),
        ("8.6", 256, "bfloat16", "plain"),
        ("9.0", 40, "float32", "plain"),
        ("9.0", 8, "bfloat16", "plain"),
        ("9.0", 128, "bfloat16", "options"),
        ("8.0", 64, "float16", "options"),
        ("9.0", 256, "float16", "ring"),
        ("9.0", 64, "bfloat16", "halo"),
    ],
)
def test_every_kernel_compiles_within_its_shared_memory(triton_cache, target, head_dim, dtype, call):
    """In a process of its own, for this one interprets."""
    dkdv = ["backward_dkdv"] * (2 if sums_apart(head_dim, dtype, PORTABLE.architecture(target)) else 1)
    tables = ["build_segments", *["build_halos"] * (call == "halo")]
    others = {"plain": [], "halo": ["copy_halo_rows", "copy_sent_rows", "fill_halo_buffer", "add_halo_rows"]}.get(
        call, ["sum_sink_rows", "sum_sink_parts"]
    )
    kernels = [*tables, "attention_forward", "backward_delta", *dkdv, "backward_dq", *others]
    assert lines_of("compile_portable", target, str(head_dim), dtype, call, **triton_cache) == kernels


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
        plan.plan_step(made, dout_strides=(512, 64))
        return
    with pytest.raises(ValueError, match="q: expected strides"):
        make_problem(q, kv, kv, call, **arguments)
    with pytest.raises(ValueError, match="dout: expected strides"):
        plan.plan_step(problem(), dout_strides=strides)


def test_tables_have_room_for_all_entries():
    assert segment_table_shapes(3) == ((7, SEGMENT_FIELDS), (4, SEQUENCE_FIELDS))
    assert segment_table_shapes(3, 2, row_layout=True) == ((2, 9, SEGMENT_FIELDS), (2, 5, SEQUENCE_FIELDS))
