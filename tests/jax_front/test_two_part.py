"""Attention to plans of documents in JAX, whole and split documents in one call, against the oracle and PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.distributed as dist
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

import zigzag_jax
import zigzag_torch
from tests.support import plan_cases
from tests.support.machine import GPU
from tests.support.plan_cases import CASES, assert_rank_is_right, rank_arrays
from tests.support.processes import run_ranks
from tests.support.spread import KERNELS, mesh_of
from zigzag_jax import host
from zigzag_jax.plans import Parts

NAMES = "out", "lse", "max_logits", "dq", "dk", "dv", "dsinks"
pytestmark = pytest.mark.multigpu


def arrays_of_ranks(case):
    """{name: array} of all ranks, one behind the other, and the sinks."""
    ranks = [rank_arrays(case, rank) for rank in range(case.world_size)]
    axes = dict.fromkeys((*plan_cases.ROWS, "dlse"), 0) | {"dlse": 1}
    joined = {name: jnp.concatenate([arrays[name] for arrays in ranks], axis) for name, axis in axes.items()}
    return joined | {"sinks": jnp.asarray(ranks[0]["sinks"])}


def attend(case, prepared=None, **options):
    """{name: array} of NAMES for all ranks; dsinks is missing without sinks."""
    attention = zigzag_jax.make_zigzag_attention(
        mesh_of(case.world_size), return_lse=True, return_max_logits=True, **case.options, **options
    )
    arrays = arrays_of_ranks(case)

    @jax.jit
    def results(q, k, v, sinks, dout, dlse):
        batch = attention.prepare_batch(case.plan if prepared is None else prepared)
        inputs = (q, k, v, sinks) if case.sinks else (q, k, v)

        def function(q, k, v, sinks=None):
            out, lse, largest = attention(q, k, v, batch, sinks=sinks)
            return (out, lse), largest

        forward, pullback, largest = jax.vjp(function, *inputs, has_aux=True)
        return *forward, largest, *pullback((dout, dlse))

    values = results(*(arrays[name] for name in ("q", "k", "v", "sinks", "dout", "dlse")))
    return dict(zip(NAMES, map(np.asarray, values), strict=False))


def of_rank(case, results, rank):
    """The rows that `rank` has of `results` of all ranks."""
    tokens = case.plan.tokens
    rows = slice(rank * tokens, (rank + 1) * tokens)
    return {
        name: x if name in ("dsinks", "max_logits") else x[:, rows] if name == "lse" else x[rows]
        for name, x in results.items()
    }


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.slow] * (x.world_size > 2)) for x in CASES], ids=str
)
def test_both_parts_in_one_call_match_the_oracle_of_the_whole_batch(case):
    for method in case.methods:
        for backend in (KERNELS, "reference") if method == case.methods[0] else (KERNELS,):
            stride = {"heads_k_stride": 1} if method == "allgather" else {}
            results = attend(case, method=method, backend=backend, **stride)
            for rank in range(case.world_size):
                where = f"{case}, {method}, {backend}, rank {rank}"
                assert_rank_is_right(where, case, rank, of_rank(case, results, rank))


def torch_results(rank, world_size, case, directory):
    arrays = {name: torch.tensor(x) for name, x in rank_arrays(case, rank).items()}
    names = "q", "k", "v", "sinks"
    leaves = [arrays[name].requires_grad_() for name in names]
    for method in case.methods:
        common = {"group": dist.group.WORLD, "method": method, "backend": "interpret"}
        batch = zigzag_torch.prepare_batch(case.plan, **common, **case.reach)
        results = zigzag_torch.zigzag_attention(
            *leaves[:3], batch, sinks=leaves[3], return_lse=True, return_max_logits=True, **case.options, **common
        )
        gradients = torch.autograd.grad(results[:2], leaves, [arrays["dout"], arrays["dlse"]])
        values = [x.detach().numpy() for x in (*results, *gradients)]
        np.savez(directory / f"{method}-{rank}.npz", **dict(zip(NAMES, values, strict=True)))


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="processes of a CPU")
def test_bits_are_those_of_pytorch(tmp_path):
    case = next(case for case in CASES if case.name == "w2-window")
    run_ranks(2, tmp_path, torch_results, case, tmp_path)
    for method in case.methods:
        ours = attend(case, method=method, backend="interpret")
        for rank in range(2):
            theirs = np.load(tmp_path / f"{method}-{rank}.npz")
            for name, x in of_rank(case, ours, rank).items():
                if name != "dsinks":  # of one rank in PyTorch
                    assert x.tobytes() == theirs[name].tobytes(), f"{method}, rank {rank}: {name}"
        of_ranks = [np.load(tmp_path / f"{method}-{rank}.npz")["dsinks"] for rank in range(2)]
        assert (ours["dsinks"] == of_ranks[0] + of_ranks[1]).all()


def test_batches_of_a_plan_size_compile_once():
    """Fifty batches of documents, which the data path makes in one size."""
    mesh, traces, rng = mesh_of(2), [], np.random.default_rng(0)
    attention = zigzag_jax.make_zigzag_attention(mesh, backend="reference")

    @jax.jit
    def step(batch):
        traces.append(batch)
        x = jnp.zeros((len(batch.input_ids), 2, 16)).at[:, 0, 0].set(batch.input_ids)
        return attention(x, x, x, attention.prepare_batch(batch)).sum()

    for _ in range(50):
        documents = [rng.integers(1, 9, rng.integers(1, 20)) for _ in range(rng.integers(1, 6))]
        batch = host.shard_documents(documents, 2, tokens=64, max_documents=6, split_tokens=24)
        assert batch.whole_tokens == 40
        assert np.isfinite(step(batch))
    assert len(traces) == 1


@pytest.mark.parametrize("backend", [KERNELS, "reference"])
def test_broken_plans_are_nan_on_all_ranks(backend):
    case = next(case for case in CASES if case.name == "w2")
    plan = case.plan
    whole = jnp.asarray([*plan.whole_cu_seqlens(0), 0, 20, 27, 27], jnp.int32)  # rank 1 has 26 rows for them
    split = (jnp.asarray(x, jnp.int32) for x in (plan.split_cu_seqlens, plan.split_lengths))
    results = attend(case, Parts(whole, *split, plan.whole_tokens, plan.tokens), backend=backend)
    assert all(np.isnan(x).all() for x in results.values())
    overfull = dataclasses.replace(plan, lengths=(33, 99, *plan.lengths[2:]))
    with pytest.raises(ValueError, match="whole_cu_seqlens: expected to end at or before the 26 rows there are"):
        zigzag_jax.validate(overfull, 2)
    zigzag_jax.validate(plan, 2)


def test_a_batch_of_documents_says_what_is_wrong_with_it():
    documents = [list(range(40)), [1, 2], [3, 4, 5]]
    batch = host.shard_documents(documents, 2, split_tokens=20)
    zigzag_jax.validate(batch, 2, halo=10, max_seqlen=40)
    in_row = host.shard_documents(documents, 2, layout="row")
    zigzag_jax.validate(in_row, 2, layout="row", max_seqlen=40)
    zigzag_jax.validate(host.shard_documents([[]], 2, layout="row"), 2, layout="row", halo=3)
    overfull = dataclasses.replace(
        batch, whole_cu_seqlens=batch.whole_cu_seqlens + np.int32(99) * (np.arange(len(batch.whole_cu_seqlens)) > 0)
    )
    for given, options, message in (
        (batch, {"halo": 11}, "expected chunks of at least the 11 rows of a halo, got 10"),
        (batch, {"max_seqlen": 39}, "max_seqlen: expected at least the 40 tokens"),
        (in_row, {"layout": "row", "max_seqlen": 39}, "max_seqlen: expected at least the 40 tokens"),
        (overfull, {}, "whole_cu_seqlens: expected"),
        (in_row, {}, "layout: expected that of the batch, 'row', got 'document'"),
        (batch, {"total": 46}, "total: expected None with a plan, got 46"),
    ):
        with pytest.raises(ValueError, match=message):
            zigzag_jax.validate(given, 2, **options)


@pytest.mark.skipif(GPU, reason="XLA of JAX 0.11.2 crashes on empty arrays of several GPUs")
@pytest.mark.parametrize("backend", [KERNELS, "reference"])
def test_a_batch_without_rows_has_no_rows_of_results(backend):
    """XLA has no collectives of such arrays."""
    attention = zigzag_jax.make_zigzag_attention(mesh_of(2), method="allgather", backend=backend)

    @jax.jit
    def both_passes(q, k):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, jnp.zeros(2, jnp.int32)), q, k, k)
        return out, *vjp(out)

    q, kv = (0, 4, 8), (0, 2, 8)
    assert [x.shape for x in both_passes(jnp.ones(q), jnp.ones(kv))] == [q, q, kv, kv]


def equations(program):
    """All equations of a traced program and of the programs in it."""
    for equation in program.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("split_tokens", [4, 0])
def test_no_empty_array_goes_through_a_program_of_several_devices(split_tokens):
    """XLA crashes on GPUs when it compiles such a program: in a plan, none of the documents may be split."""
    case = dataclasses.replace(CASES[0], split=(), split_tokens=split_tokens)
    plan = dataclasses.replace(case.plan, max_split=0)
    attention = zigzag_jax.make_zigzag_attention(mesh_of(2))
    arrays = arrays_of_ranks(case)

    def out(q, k, v):
        batch = attention.prepare_batch(plan)
        assert batch.lengths is None
        return attention(q, k, v, batch)

    rows = [arrays[name] for name in "qkv"]
    mapped = [x for x in equations(jax.make_jaxpr(out)(*rows).jaxpr) if x.primitive.name == "shard_map"]
    assert len(mapped) == 2
    for equation in mapped:
        assert not [x for x in (*equation.invars, *equation.outvars) if 0 in x.aval.shape]
    for rank, result in enumerate(np.split(np.asarray(jax.jit(out)(*rows)), 2)):
        assert_rank_is_right("no document is split", case, rank, {"out": result})


def test_a_plan_inside_shard_map_is_that_outside():
    """Each device takes its own rows of a plan, and of a batch of the data path."""
    case = next(case for case in CASES if case.name == "w2")
    arrays, mesh = arrays_of_ranks(case), mesh_of(2)
    documents = [np.full(length, 3) for length in case.plan.lengths]
    made = host.shard_documents(documents, 2, tokens=46, split_tokens=20)
    attention = zigzag_jax.make_zigzag_attention(mesh)
    for given, mapped in ((case.plan, ()), (made, (made,))):

        def inside(q, k, v, *batch, given=given):
            prepared = zigzag_jax.prepare_batch(*(batch or (given,)), axis_name="cp")
            return zigzag_jax.zigzag_attention(q, k, v, prepared, axis_name="cp")

        rows = [P("cp")] * 3 + [batch.specs() for batch in mapped]
        call = jax.shard_map(inside, mesh=mesh, in_specs=tuple(rows), out_specs=P("cp"))
        qkv = [arrays[name] for name in "qkv"]
        wanted = jax.jit(lambda q, k, v, given=given: attention(q, k, v, attention.prepare_batch(given)))(*qkv)
        np.testing.assert_array_equal(jax.jit(call)(*qkv, *mapped), wanted)


def test_a_plan_on_one_rank_is_one_part():
    case = dataclasses.replace(CASES[0], whole=((9, 14),), split=(33,), split_tokens=36)
    arrays = rank_arrays(case, 0)
    for prepared in (zigzag_jax.prepare_batch(case.plan), zigzag_jax.prepare_batch(Parts.of_plan(case.plan, 0))):
        out = zigzag_jax.zigzag_attention(*(arrays[name] for name in "qkv"), prepared)
        assert_rank_is_right("one rank", case, 0, {"out": np.asarray(out)})
        with pytest.raises(ValueError, match="q: expected the 62 rows that a rank has in the plan, got 61"):
            zigzag_jax.zigzag_attention(*(arrays[name][:61] for name in "qkv"), prepared)
    assert zigzag_jax.prepare_batch(dataclasses.replace(case, split=(), split_tokens=0).plan).lengths is None


def test_a_plan_deals_out_rows_positions_and_puts_them_together():
    plan, x = CASES[0].plan, np.random.default_rng(0).standard_normal((79, 2), np.float32)
    rows = [zigzag_jax.shard(x, plan, rank, 2) for rank in (0, jnp.int32(1))]
    for rank, own in enumerate(rows):
        held = np.array(plan.rows(rank))
        np.testing.assert_array_equal(own, np.where((held >= 0)[:, None], x[held], 0))
        assert zigzag_jax.position_ids(plan, rank, 2).tolist() == plan.positions(rank)
    np.testing.assert_array_equal(zigzag_jax.unshard(jnp.concatenate(rows), plan, 2), x)


def test_what_a_plan_does_not_take_is_refused():
    plan = CASES[0].plan
    x = jnp.zeros((79, 2))
    for call, message in (
        (lambda: zigzag_jax.validate(plan, 3), "world_size: expected that of the plan, 2, got 3"),
        (lambda: zigzag_jax.shard(x[1:], plan, 0, 2), "x: expected the 79 tokens of the plan, got shape"),
        (lambda: zigzag_jax.unshard(x, plan, 2), "x: expected the 92 rows of all ranks in the plan, got shape"),
        (lambda: zigzag_jax.position_ids(plan, 0, 2, 9), "tokens: expected None or those of the plan, 46, got 9"),
        (lambda: zigzag_jax.prepare_batch(plan, 0, 2), "axis_name: expected that of the ranks of a plan .*, got None"),
        (lambda: zigzag_jax.prepare_batch(plan, 0, 2, lengths=[3]), "lengths: expected None with a plan"),
        (lambda: zigzag_jax.prepare_batch(plan, 0, 2, layout="row", row_length=92), "layout: expected document with"),
        (lambda: attend(CASES[0], backend="reference", layout="row"), "layout: expected 'document' with a plan"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    attention = zigzag_jax.make_zigzag_attention(mesh_of(2))
    prepared = attention.prepare_batch(plan)
    with pytest.raises(ValueError, match="q: expected the 46 rows that a rank has in the plan, got 44"):
        attention(*(jnp.zeros((88, heads, 16)) for heads in (4, 2, 2)), prepared)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected a batch .* prepared with this axis_name"):
        zigzag_jax.zigzag_attention_gathered(
            jnp.zeros((46, 4, 16)), *(jnp.zeros((92, 2, 16)) for _ in range(2)), prepared, 0, 2
        )
