"""What the kernels for Hopper compute, on one: against the oracle, in both frameworks, and beside values not finite."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import frameworks
from tests.support.cases import BENCH, CASES, RESULTS, Case, make_inputs
from tests.support.hopper import FUSED, OF_SINKS, PAIR, needs_hopper
from tests.support.parts import FRAMEWORKS, Rank
from tests.support.planners import RememberingPlanner
from tests.support.rank import accept_capped_scores, assert_rank_is_right, gathered_rows, rank_arrays, rank_rows
from zigzag_kernels import plan
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.plan import operation

pytestmark = [pytest.mark.gpu, needs_hopper]

SELECTED = [
    case
    for case in CASES
    if case.tags.isdisjoint(BENCH)
    and case.dtype != "float32"
    and rules.MIN_HEAD_DIM <= case.head_dim <= rules.MAX_HEAD_DIM
]
# Chunks of no whole block, and padding: boxes of keys run over the ends of chunks, sequences and slots.
UNEVEN = Case(
    name="hopper-w2", world_size=2, lengths=(1004, 4, 1200, 0), heads=4, kv_heads=2, head_dim=128, dtype="bfloat16",
    padding=70,
)  # fmt: skip
PLAIN = replace(UNEVEN, name="hopper-w1", world_size=1, lengths=(503, 1, 600, 0), head_dim=64, dtype="float16")
# Each row sees few of the many tiles.
WINDOWS = replace(
    PLAIN, name="hopper-w1-windows", lengths=(2500, 1, 300), heads=16, window_size=(900, -1), head_dim=128
)
# Documents that begin anywhere in a packed row, one of them in the middle of a chunk.
ROW = replace(UNEVEN, name="hopper-row", lengths=(503, 1, 0, 1300, 267), padding=81, layout="row")
# Every option, with blocks that rows see wholly, on an edge, and not at all.
RANGED = [
    replace(UNEVEN, name="hopper-w2-window", window_size=(250, -1), sinks=True),
    replace(UNEVEN, name="hopper-w2-chunk", attention_chunk=300, lengths_real=(1001, 0, 1130, 0), softcap=2.0),
    replace(UNEVEN, name="hopper-w2-full", window_size=(200, 330), causal=False, head_dim=64, softcap=3.0, sinks=True),
    replace(PLAIN, name="hopper-w1-window", window_size=(127, -1), sinks=True),
    replace(
        PLAIN, name="hopper-w1-full", window_size=(100, 140), causal=False, head_dim=128, lengths_real=(470, 1, 600, 0)
    ),
    ROW,
    replace(
        UNEVEN, name="hopper-w2-wide", head_dim=256, attention_chunk=300, lengths_real=(1001, 0, 1130, 0), softcap=2.0
    ),
    replace(
        ROW, name="hopper-row-wide", head_dim=192, window_size=(150, 40), causal=False, sinks=True, dtype="float16"
    ),
    replace(ROW, name="hopper-row-window", window_size=(150, -1), head_dim=96, lengths_real=(503, 0, 0, 1250, 267)),
    replace(ROW, name="hopper-row-full", causal=False, head_dim=64, sinks=True, dtype="float16"),
]


@pytest.fixture
def forced(monkeypatch):
    """They are taken wherever they can serve; the planner, which says which were launched."""
    monkeypatch.setenv(HOPPER.variable, "1")
    frameworks._jax_attention.cache_clear()
    with plan.use_planner(RememberingPlanner()) as planner:
        yield planner
    frameworks._jax_attention.cache_clear()


@pytest.mark.parametrize("case", [*SELECTED, UNEVEN, PLAIN, *RANGED], ids=str)
def test_they_match_the_oracle_in_both_frameworks(case, forced):
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        arrays = *rank_arrays(case, inputs, rank), rank, "triton"
        results, theirs = (
            attend(case, *arrays, sinks=inputs.get("sinks"))
            for attend in (frameworks.attend_torch, frameworks.attend_jax)
        )
        for name in case.results:
            assert results[name].tobytes() == theirs[name].tobytes(), f"rank {rank}, {name}: torch and JAX differ"
        accept_capped_scores(case, inputs, rank, results)
        assert_rank_is_right(case, inputs, rank, {"torch": results})
    assert forced.functions - OF_SINKS == PAIR


@pytest.mark.parametrize(
    "case",
    [
        replace(UNEVEN, heads=16, kv_heads=8),
        replace(PLAIN, heads=12, kv_heads=4),
        *(replace(case, heads=8, kv_heads=4) for case in RANGED if case.head_dim <= 128),
    ],
    ids=str,
)
def test_programs_of_several_heads_compute_the_same_bits(case, forced, monkeypatch):
    """Each head's rows and keys come while those of the head before are at work, through the same buffers."""
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        arrays, sinks = (*rank_arrays(case, inputs, rank), rank, "triton"), inputs.get("sinks")
        alone = frameworks.attend_torch(case, *arrays, sinks=sinks)
        assert forced.functions - OF_SINKS == PAIR
        for heads in {2, 4, case.kv_heads}:
            with monkeypatch.context() as patch, plan.use_planner(RememberingPlanner()):
                patch.setattr(operation, "count_heads_together", lambda *_, heads=heads: heads)
                together = frameworks.attend_torch(case, *arrays, sinks=sinks)
            for name in case.results:
                assert together[name].tobytes() == alone[name].tobytes(), f"rank {rank}, {heads} heads: {name}"


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in (*SELECTED, *RANGED) if case.head_dim <= rules.MAX_HEAD_DIM_FUSED),
        UNEVEN,
        PLAIN,
        WINDOWS,
    ],
    ids=str,
)
def test_the_fused_backward_matches_the_oracle_in_both_frameworks(case, forced):
    inputs, rank = make_inputs(case), case.world_size // 2
    arrays, sinks = (*rank_arrays(case, inputs, rank), rank, "triton"), inputs.get("sinks")
    attends = {"torch": frameworks.attend_torch, "jax": frameworks.attend_jax}
    named = {name: attend(case, *arrays, deterministic=False, sinks=sinks) for name, attend in attends.items()}
    for results in named.values():
        accept_capped_scores(case, inputs, rank, results)
    assert_rank_is_right(case, inputs, rank, named)
    assert forced.functions - OF_SINKS == FUSED


@pytest.fixture
def in_turns(forced, monkeypatch):
    """Tiles of keys take turns wherever they can; the planner, which says which kernels were launched."""
    monkeypatch.setenv(rules.TURNS, "1")
    return forced


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in SELECTED if case.head_dim <= rules.MAX_HEAD_DIM_FUSED),
        replace(UNEVEN, name="hopper-w2-d128", heads=6),
        replace(PLAIN, name="hopper-w1-d96", heads=8, head_dim=96),
        replace(UNEVEN, name="hopper-w2-d64", heads=8, kv_heads=4, head_dim=64),
        replace(PLAIN, name="hopper-w1-d40", heads=15, kv_heads=3, head_dim=40),
        replace(UNEVEN, name="hopper-w2-softcap", head_dim=64, softcap=2.0),
        *(case for case in RANGED if case.head_dim <= rules.MAX_HEAD_DIM_FUSED),
        WINDOWS,
        replace(UNEVEN, name="hopper-w2-chunks-smaller-than-a-tile", heads=8, attention_chunk=50),
    ],
    ids=str,
)
def test_in_turns_the_fused_backward_repeats_and_matches_the_oracle_in_both_frameworks(case, in_turns):
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        arrays, sinks = (*rank_arrays(case, inputs, rank), rank, "triton"), inputs.get("sinks")
        results, again = (frameworks.attend_torch(case, *arrays, sinks=sinks) for _ in range(2))
        theirs = frameworks.attend_jax(case, *arrays, sinks=sinks)
        for name in RESULTS:
            assert results[name].tobytes() == again[name].tobytes(), f"rank {rank}, {name}: not repeated"
            assert results[name].tobytes() == theirs[name].tobytes(), f"rank {rank}, {name}: torch and JAX differ"
        accept_capped_scores(case, inputs, rank, results)
        assert_rank_is_right(case, inputs, rank, {"turns": results})
    assert in_turns.functions - OF_SINKS == FUSED


@pytest.mark.parametrize("case", [replace(UNEVEN, heads=9, kv_heads=3), replace(PLAIN, heads=8)], ids=str)
def test_windows_in_turns_have_the_bits_of_all_heads_at_once_in_both_frameworks(case, in_turns):
    inputs, rows = make_inputs(case), gathered_rows(case)
    for rank in range(case.world_size):
        torch_rank, jax_rank = (Rank(case, inputs, rank, FRAMEWORKS[name], gluon=True) for name in ("torch", "jax"))
        whole, windows = torch_rank.whole(KVLayout.GATHERED, rows), torch_rank.windows(rows)
        theirs = jax_rank.windows(rows)
        for name in RESULTS:
            assert windows[name].tobytes() == whole[name].tobytes(), f"rank {rank}, {name}: windows change bits"
            assert windows[name].tobytes() == theirs[name].tobytes(), f"rank {rank}, {name}: torch and JAX differ"
        assert_rank_is_right(case, inputs, rank, {"windows": windows})
    assert in_turns.functions == FUSED


def beside_foul(case, rank, arrays, clean, foul, **options):
    """For each sequence, and the padding, the results if it is `foul`: its keys, or else its queries; what may be foul
    is replaced by that of `clean`."""
    q, k, v, dout, dlse = arrays
    rows = rank_rows(case, rank)
    gathered = gathered_rows(case)
    keys_of, rows_of = (np.searchsorted(case.cu_seqlens[1:], x, "right") for x in (gathered, rows))
    for sequence in {*keys_of}:
        its_keys, its_rows = (of == sequence for of in (keys_of, rows_of))
        foul_k, foul_v = (np.where(its_keys[:, None, None], np.float32(foul), x) for x in (k, v))
        foul_q, foul_dout = (np.where(its_rows[:, None, None], np.float32(foul), x) for x in (q, dout))
        for spoilt in ((q, foul_k, foul_v, dout, dlse), (foul_q, k, v, foul_dout, dlse)):
            results = frameworks.attend_torch(case, *spoilt, rank, "triton", **options)
            masks = dict.fromkeys(("out", "dq"), its_rows[:, None, None])
            masks |= dict.fromkeys(("dk", "dv"), its_keys[:, None, None]) | {"lse": its_rows}
            yield {name: np.where(mask, clean[name], results[name]) for name, mask in masks.items()}


@pytest.mark.parametrize("case", [UNEVEN, PLAIN], ids=str)
@pytest.mark.parametrize("foul", [np.nan, np.inf])
def test_no_other_sequence_and_no_padding_reaches_a_result(case, foul, forced):
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        arrays = rank_arrays(case, inputs, rank)
        clean = frameworks.attend_torch(case, *arrays, rank, "triton")
        for results in beside_foul(case, rank, arrays, clean, foul):
            for name in RESULTS:
                np.testing.assert_array_equal(results[name], clean[name])


@pytest.mark.parametrize("case", [UNEVEN, PLAIN], ids=str)
@pytest.mark.parametrize("foul", [np.nan, np.inf])
def test_nor_does_it_reach_those_of_the_fused_backward(case, foul, forced):
    inputs, rank = make_inputs(case), case.world_size // 2
    arrays = rank_arrays(case, inputs, rank)
    clean = frameworks.attend_torch(case, *arrays, rank, "triton", deterministic=False)
    others = [*beside_foul(case, rank, arrays, clean, foul, deterministic=False)]
    assert_rank_is_right(case, inputs, rank, {"clean": clean} | {f"foul {i}": x for i, x in enumerate(others)})
    for results in others:
        for name in ("out", "lse", "dk", "dv"):  # all but dQ have one owner here too
            np.testing.assert_array_equal(results[name], clean[name])
    assert forced.functions == FUSED


@pytest.mark.parametrize("case", [UNEVEN, replace(UNEVEN, head_dim=64)], ids=["128", "64"])
@pytest.mark.parametrize("foul", [np.nan, np.inf])
def test_nor_in_turns(case, foul, in_turns):
    inputs = make_inputs(case)
    arrays = rank_arrays(case, inputs, 1)
    clean = frameworks.attend_torch(case, *arrays, 1, "triton")
    for results in beside_foul(case, 1, arrays, clean, foul):
        for name in RESULTS:
            np.testing.assert_array_equal(results[name], clean[name])
    assert in_turns.functions == FUSED


def test_six_of_them_in_one_function_of_jax(forced):
    """XLA makes CUDA graphs of so many kernels, in which nothing can be allocated; one rank in `shard_map` likewise."""
    q, k, v, *_ = rank_arrays(PLAIN, make_inputs(PLAIN), 0)
    q, k, v = (jnp.asarray(x, PLAIN.dtype) for x in (q, k, v))
    cu_seqlens = jnp.asarray(PLAIN.cu_seqlens, jnp.int32)

    def layers(q, k, v, cu_seqlens):
        for _ in range(6):
            q = zigzag_jax.zigzag_attention(q, k, v, cu_seqlens)
        return q

    one_by_one = layers(q, k, v, cu_seqlens)
    mesh = Mesh(jax.devices()[:1], ("cp",))
    together, sharded = (
        jax.jit(function)
        for function in (layers, jax.shard_map(layers, mesh=mesh, in_specs=(P("cp"), P(), P(), P()), out_specs=P("cp")))
    )
    for _ in range(3):
        np.testing.assert_array_equal(together(q, k, v, cu_seqlens), one_by_one)
        np.testing.assert_array_equal(sharded(q, k, v, cu_seqlens), one_by_one)
    assert forced.functions == {"attention_forward_hopper"}
