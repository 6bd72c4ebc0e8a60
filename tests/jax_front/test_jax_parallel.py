"""Attention spread over a mesh axis against the float64 oracle of the unsharded batch: both methods, both backends."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import cancelling, cases, oracle
from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.closeness import assert_close
from tests.support.machine import GPU
from tests.support.parts import FRAMEWORKS, Rank
from tests.support.rank import batch_results, gathered_rows, rows_of_results
from tests.support.spread import (
    BACKENDS,
    KERNELS,
    METHODS,
    assert_batch_is_right,
    assert_same,
    global_arrays,
    mesh_of,
    offsets,
    value_and_gradients,
)
from zigzag_jax import launch

CASES = (
    Case(name="w1", world_size=1, lengths=(9, 0, 14), heads=4, kv_heads=2, padding=2, dtype="bfloat16"),
    Case(name="w2", world_size=2, lengths=(12, 0, 20, 0), heads=4, kv_heads=2, padding=3, softmax_scale=0.4),
    Case(name="w2-full", world_size=2, lengths=(8, 28), kv_heads=2, head_dim=24, causal=False, dtype="float16"),
    Case(name="w4", world_size=4, lengths=(24, 0, 40), heads=4, kv_heads=2, padding=1, dtype="bfloat16"),
    Case(name="w4-full", world_size=4, lengths=(0, 32, 16), heads=3, kv_heads=1, causal=False),
    Case(name="w8", world_size=8, lengths=(48,)),
    *(case for case in cases.CASES if GPU and case.name in ("w2-edges", "w4-llama", "w8-64-uneven")),
)
# XLA compiles each for a second: of the reference two do for `make test`.
QUICK_REFERENCE = ("w2", "w4")
SPREAD = [
    pytest.param(
        case,
        backend,
        id=f"{case.name}-{backend}",
        marks=[pytest.mark.multigpu] * (case.world_size > 1)
        + [pytest.mark.slow] * (backend == "reference" and case.name not in QUICK_REFERENCE),
    )
    for case in CASES
    for backend in BACKENDS
]
WINDOWS = Case(name="windows", world_size=2, lengths=(28,), heads=4, kv_heads=4, dtype="bfloat16")
SMALL = Case(name="small", world_size=2, lengths=(8, 20), dtype="bfloat16")


def spread(case, check_vma=True, prepared=False, cu_spec=P(), **options):  # noqa: B008
    """`(q, k, v, dout, dlse, cu_seqlens) -> RESULTS` of the whole batch, computed inside one `shard_map`."""

    def body(q, k, v, dout, dlse, lengths):
        if prepared:
            shared = {name: options[name] for name in ("method", "backend") if name in options}
            lengths = zigzag_jax.prepare_batch(lengths, axis_name="cp", **shared)

        def attend(q, k, v):
            return zigzag_jax.zigzag_attention(
                q, k, v, lengths, axis_name="cp", causal=case.causal, softmax_scale=case.softmax_scale,
                return_lse=True, **options,
            )  # fmt: skip

        return value_and_gradients(attend)(q, k, v, dout, dlse)

    rows, lse = P("cp"), P(None, "cp")
    in_specs, out_specs = (rows, rows, rows, rows, lse, cu_spec), (rows, lse, rows, rows, rows)
    mesh = mesh_of(case.world_size)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("case", "backend"), SPREAD)
def test_all_ranks_give_the_results_of_the_whole_batch(case, backend, method):
    results = spread(case, method=method, backend=backend)(*global_arrays(case), offsets(case))
    assert [str(x.dtype) for x in results] == [case.dtype, "float32", *[case.dtype] * 3]
    assert_batch_is_right(case, results)


@pytest.mark.multigpu
@pytest.mark.parametrize("method", METHODS)
def test_the_bits_are_those_of_the_launches_in_torch(method):
    """Windows in turn, keys of the ring in the order of the steps: out, lse and dq, whose sums are of one rank."""
    case = Case(name="w3", world_size=3, lengths=(30,), kv_heads=2, dtype="bfloat16")
    results = spread(case, method=method, heads_k_stride=1, backend=KERNELS)(*global_arrays(case), offsets(case))
    for rank in range(case.world_size):
        player = Rank(case, make_inputs(case), rank, FRAMEWORKS["torch"])
        wanted = player.ring() if method == "ring" else player.windows(gathered_rows(case))
        rows = slice(rank * case.tokens, (rank + 1) * case.tokens)
        for name, result in zip(RESULTS[:3], results[:3], strict=True):
            ours = result[:, rows] if name == "lse" else result[rows]
            np.testing.assert_array_equal(ours, wanted[name].astype(ours.dtype), f"rank {rank}: {name}")


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_heads_give_the_same_bits(backend):
    arrays = *global_arrays(WINDOWS), offsets(WINDOWS)
    whole, *windows = (spread(WINDOWS, heads_k_stride=stride, backend=backend)(*arrays) for stride in (4, 2, 1))
    assert_batch_is_right(WINDOWS, whole)
    for results in windows:
        assert_batch_is_right(WINDOWS, results)
        if backend == KERNELS:
            assert_same(results, whole)


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_sum_in_float32_and_gradients_of_keys_in_the_type_that_is_asked_for(method, backend):
    """Contributions that all but cancel: with partial sums in bfloat16 little of the result is right."""
    case, inputs = cancelling.CASE, cancelling.make_inputs()
    rows = gathered_rows(case)
    *arrays, dlse = (inputs[name][:, rows] if name == "dlse" else inputs[name][rows] for name in inputs)
    arrays = *(jnp.asarray(x, case.dtype) for x in arrays), dlse, offsets(case)
    exact, straightforward = (
        rows_of_results(batch_results(case, inputs, x), rows)
        for x in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    in_float32, rounded = (
        spread(case, method=method, backend=backend, grad_reduce_dtype=x)(*arrays) for x in (None, case.dtype)
    )
    for name, x, of_rounded in zip(RESULTS, in_float32, rounded, strict=True):
        assert_close(name, x, exact[name], straightforward[name])
        if name not in ("dk", "dv"):
            np.testing.assert_array_equal(x, of_rounded)
            continue
        with pytest.raises(AssertionError, match="by Frobenius norm exceeds"):
            assert_close(name, of_rounded, exact[name], straightforward[name])


@pytest.mark.multigpu
@pytest.mark.parametrize("method", METHODS)
def test_types_unchecked_and_tables_prepared_give_the_same_bits(method):
    case = SMALL
    arrays = *global_arrays(case), jnp.append(offsets(case), jnp.full(2, case.cu_seqlens[-1], jnp.int32))
    results = spread(case, method=method, backend=KERNELS)(*arrays)
    assert_batch_is_right(case, results)
    other = spread(case, method=method, backend=KERNELS, check_vma=False, prepared=True)(*arrays[:-1], offsets(case))
    assert_same(other, results)


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_sums_over_ranks_in_the_type_of_the_inputs(method, backend):
    arrays = *global_arrays(SMALL), offsets(SMALL)
    options = {"method": method, "backend": backend}
    exact, rounded = (spread(SMALL, grad_reduce_dtype=x, **options)(*arrays) for x in (None, jnp.bfloat16))
    assert_same(exact[:3], rounded[:3])
    assert_batch_is_right(SMALL, rounded)
    for ours, theirs in zip(exact[3:], rounded[3:], strict=True):
        assert (ours != theirs).any()


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_impossible_lengths_give_nan_on_every_rank(method, backend):
    function = spread(SMALL, method=method, backend=backend)
    for lengths in ((0, 6, 28), (0, 20, 8), (4, 8, 28), (0, 8, 40)):  # uneven, negative, late, too many
        results = function(*global_arrays(SMALL), jnp.array(lengths, jnp.int32))
        assert all(jnp.isnan(result).all() for result in results), lengths


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_prepare_different_lengths_get_nan(backend):
    function = spread(SMALL, check_vma=False, prepared=True, cu_spec=P("cp"), backend=backend)
    for lengths in ((0, 8, 28), (0, 12, 28)):
        results = function(*global_arrays(SMALL), jnp.array([0, 8, 28, *lengths], jnp.int32))
        assert all(jnp.isnan(result).all() == (lengths[1] == 12) for result in results)


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_leaves_one_shard_map_and_enters_another(method, backend):
    """With the specs that `Batch` documents. It says which axis has compared the lengths."""
    case, rows = SMALL, P("cp")
    options = {"axis_name": "cp", "method": method, "backend": backend}
    tables = (None, None) if backend == "reference" else (rows, rows)
    specs = zigzag_jax.Batch(P(), rows, case.world_size, method, *tables, "cp")
    over_ranks = functools.partial(jax.shard_map, mesh=mesh_of(case.world_size))
    prepare = over_ranks(functools.partial(zigzag_jax.prepare_batch, **options), in_specs=P(), out_specs=specs)
    attend = functools.partial(zigzag_jax.zigzag_attention, **options)
    q, k, v, *_ = global_arrays(case)
    batch = jax.jit(prepare)(offsets(case))
    assert batch.compared_by == "cp"
    results, expected = (
        jax.jit(over_ranks(attend, in_specs=(rows, rows, rows, lengths_specs), out_specs=rows))(q, k, v, lengths)
        for lengths, lengths_specs in ((batch, specs), (offsets(case), P()))
    )
    assert_same([results], [expected])


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["one number", "one row", "transposed"])
def test_cotangents_that_are_broadcast_or_transposed(kind, method, backend):
    """Kernels read dense rows of dout, and a loss such as `out.sum()` makes none by itself."""
    case = dataclasses.replace(SMALL, heads=4, kv_heads=2, dtype="float32")
    q, k, v, dout, _ = global_arrays(case)
    attend = zigzag_jax.make_zigzag_attention(mesh_of(case.world_size), method=method, backend=backend)
    losses = {
        "one number": (lambda out: out.sum(), jnp.ones_like(dout)),
        "one row": (lambda out: (out.sum(0) * dout[0]).sum(), jnp.broadcast_to(dout[0], dout.shape)),
        "transposed": (lambda out: (out.transpose(1, 2, 0) * dout.transpose(1, 2, 0)).sum(), dout),
    }
    loss, cotangent = losses[kind]
    gradients = jax.jit(jax.grad(lambda q, k, v: loss(attend(q, k, v, offsets(case))), (0, 1, 2)))(q, k, v)

    inputs, rows = make_inputs(case), gathered_rows(case)
    inputs = inputs | {"dout": np.empty_like(inputs["dout"]), "dlse": np.zeros_like(inputs["dlse"])}
    inputs["dout"][rows] = cotangent
    exact, straightforward = (
        rows_of_results(batch_results(case, inputs, arithmetic), rows)
        for arithmetic in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_close(name, gradient, exact[name], straightforward[name])


@pytest.mark.multigpu
@pytest.mark.parametrize("method", METHODS)
def test_scan_over_checkpointed_layers(method):
    """The backward attends no second time where out and lse are saved, but brings K/V again."""
    case = CASES[1]
    q, k, v, dout, _ = global_arrays(case)
    scales = jnp.asarray([1.0, 0.5], jnp.float32)
    save = jax.checkpoint_policies.save_only_these_names("zigzag_out", "zigzag_lse")

    def loss(scales, backend, remat):
        def body(scales, q, k, v, dout, cu_seqlens):
            batch = zigzag_jax.prepare_batch(cu_seqlens, axis_name="cp", method=method, backend=backend)

            @remat
            def layer(carry, scale):
                out = zigzag_jax.zigzag_attention(
                    carry, k, v * scale, batch, axis_name="cp", method=method, backend=backend
                )
                return carry + out, None

            return jax.lax.psum(jnp.sum(jax.lax.scan(layer, q, scales)[0] * dout), "cp")

        in_specs = P(), *[P("cp")] * 4, P()
        function = jax.shard_map(body, mesh=mesh_of(case.world_size), in_specs=in_specs, out_specs=P())
        return function(scales, q, k, v, dout, offsets(case))

    function = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    expected = function(scales, "reference", lambda layer: layer)
    results = function(scales, KERNELS, functools.partial(jax.checkpoint, policy=save))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), results, expected)


def collectives(case, **options):
    """What is sent in forward and backward, as JAX lowers it: {name of the operation: types of its operands}."""
    text = spread(case, backend=KERNELS, **options).lower(*global_arrays(case), offsets(case)).as_text()
    found = {"all_gather": [], "reduce_scatter": [], "collective_permute": []}
    names = "|".join(found)
    for name, operand in re.findall(rf'"stablehlo\.({names})".*?: \(tensor<(\S+?)>\) ->', text, re.DOTALL):
        found[name].append(operand)
    return found


def test_keys_arrive_one_window_at_a_time_and_gradients_leave_in_float32():
    sent = collectives(WINDOWS, heads_k_stride=1)
    assert sent["all_gather"] == ["14x1x16xbf16"] * 2 * 4 * 2  # K and V of four windows, forward and backward
    assert sent["reduce_scatter"] == ["28x1x16xf32"] * 2 * 4
    assert not sent["collective_permute"]
    assert collectives(WINDOWS, heads_k_stride=2)["all_gather"] == ["14x2x16xbf16"] * 2 * 2 * 2


@pytest.mark.parametrize("world_size", [4, 8])
def test_a_ring_of_any_size_is_a_program_of_the_same_size(world_size):
    case = dataclasses.replace(WINDOWS, world_size=world_size, lengths=(14 * world_size,))
    sent = collectives(case, method="ring")
    assert not sent["all_gather"] + sent["reduce_scatter"]
    # Keys leave in the first step and in those of the loop, gradients in the last one too. JAX 0.12 writes the body of
    # a loop twice.
    keys, gradients = (sent["collective_permute"].count(f"14x4x16x{dtype}") for dtype in ("bf16", "f32"))
    assert (keys, gradients) in {(2 * 2 * 2, 3 * 2), (2 * 3 * 2, 4 * 2)}
    assert keys + gradients == len(sent["collective_permute"])


REFUSED = {
    "method": ({"method": "tree"}, "method: expected 'allgather', 'ring' or 'halo', got 'tree'"),
    "stride": ({"heads_k_stride": 3}, "heads_k_stride: expected a divisor of the 4 KV heads, got 3"),
    "reduce": (
        {"grad_reduce_dtype": "float16"},
        "grad_reduce_dtype: expected None, float32 or .* bfloat16, got float16",
    ),
    "axis": ({"axis_name": "tp"}, "axis_name: expected a mesh axis of the shard_map around this, got 'tp'"),
    "batch of no axis": ({"cu_seqlens": {}}, "world_size: expected that of the prepared batch, 1, got 2"),
    "batch of a method": (
        {"method": "ring", "cu_seqlens": {"axis_name": "cp"}},
        "method: expected that of the prepared batch, 'allgather', got 'ring'",
    ),
    "batch of one rank": (
        {"cu_seqlens": {"rank": 0, "world_size": 2}},
        "rank: .* got the same rank everywhere",
    ),
    "k rows": (dict.fromkeys("kv", jnp.zeros((15, 4, 16), jnp.bfloat16)), "k: expected the 14 rows of q, got 15"),
    "odd sequence": (
        {"cu_seqlens": None, **dict.fromkeys("qkv", jnp.zeros((13, 4, 16)))},
        "q: expected an even number of tokens of a sequence on each rank, got 13",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_calls_are_refused_when_traced(case):
    changed, message = REFUSED[case]

    def body(q, k, v, cu_seqlens):
        if isinstance(changed.get("cu_seqlens"), dict):
            cu_seqlens = zigzag_jax.prepare_batch(cu_seqlens, **changed["cu_seqlens"])
        arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "axis_name": "cp"}
        arguments |= {name: x for name, x in changed.items() if not isinstance(x, dict)}
        return zigzag_jax.zigzag_attention(**arguments)

    in_specs = P("cp"), P("cp"), P("cp"), P()
    function = jax.shard_map(body, mesh=mesh_of(2), in_specs=in_specs, out_specs=P("cp"))
    with pytest.raises(ValueError, match=message):
        jax.jit(function)(*global_arrays(WINDOWS)[:3], offsets(WINDOWS))


def test_lengths_that_vary_along_the_axis_are_refused():
    arrays = *global_arrays(SMALL), jnp.array([0, 28] * 2, jnp.int32)
    for prepared in (False, True):
        with pytest.raises(ValueError, match=r"cu_seqlens: expected the same on every rank .* with P\(\) in in_specs"):
            spread(SMALL, prepared=prepared, cu_spec=P("cp"))(*arrays)


def test_one_device_has_nothing_to_move():
    """Options between ranks are checked and mean nothing, so that a script runs on any number of devices."""
    q, k, v = global_arrays(WINDOWS)[:3]
    out = zigzag_jax.zigzag_attention(q, k, v)
    assert_same([zigzag_jax.zigzag_attention(q, k, v, method="ring", heads_k_stride=2)], [out])
    with pytest.raises(ValueError, match="heads_k_stride"):
        zigzag_jax.zigzag_attention(q, k, v, heads_k_stride=5)


def test_one_device_launches_what_a_group_of_one_rank_does(monkeypatch):
    launched, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda made, *arrays: launched.append(made) or run(made, *arrays))
    q, k, v = (jnp.zeros((56, 4, 16)) for _ in range(3))
    cu_seqlens = jnp.array([0, 30, 56], jnp.int32)
    for attend in (
        functools.partial(zigzag_jax.zigzag_attention, cu_seqlens=cu_seqlens),
        functools.partial(zigzag_jax.zigzag_attention_gathered, cu_seqlens=cu_seqlens, rank=0, world_size=1),
    ):
        jax.eval_shape(jax.grad(lambda q, k, v, attend=attend: attend(q, k, v, backend=KERNELS).sum()), q, k, v)
    described = [(made.kernel, made.grid, made.constexprs) for made in launched]
    assert len(described) == 2 * 5
    assert described[:5] == described[5:]


def test_merge_partials_of_disjoint_keys():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((12, 1, 8)) for _ in range(3))
    scores = np.einsum("thd,shd->hts", q, k)
    # Row 0 sees no key at all, row 1 none of the second part.
    mask = rng.random((12, 12)) < 0.7
    mask[0], mask[1, 6:] = False, False

    def attend(scores, v, mask):
        weights = jnp.where(mask, jnp.exp(scores), 0.0)
        total = weights.sum(-1)
        seen = jnp.where(total > 0, total, 1.0)
        out = jnp.einsum("hts,shd->thd", weights / seen[..., None], v, precision="highest")
        return out, jnp.where(total > 0, jnp.log(seen), -jnp.inf)

    whole = functools.partial(attend, v=v, mask=mask)

    def merged(scores):
        parts = [attend(scores[..., part], v[part], mask[:, part]) for part in (slice(0, 6), slice(6, 12))]
        return zigzag_jax.merge_partials(*(jnp.stack(x) for x in zip(*parts, strict=True)))

    def loss(function, scores):
        out, lse = function(scores)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    for result, wanted in zip(jax.jit(merged)(scores), jax.jit(whole)(scores), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)
    gradients = (jax.jit(jax.grad(functools.partial(loss, function))) for function in (merged, whole))
    ours, theirs = (gradient(jnp.asarray(scores)) for gradient in gradients)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="lse: expected"):
        zigzag_jax.merge_partials(jnp.zeros((2, 5, 3, 8)), jnp.zeros((2, 5, 3)))
