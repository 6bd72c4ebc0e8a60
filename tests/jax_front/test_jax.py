"""What JAX adds to the kernels: its transformations, traced ranks and lengths, `shard_map`, and clear refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import oracle
from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.closeness import assert_close
from tests.support.commands import lines_of
from tests.support.hopper import PAIR, RUNS, assert_kernels_for_hopper, hopper_head_dim
from tests.support.machine import GPU
from tests.support.planners import RememberingPlanner
from tests.support.rank import batch_results, gathered_rows, rank_arrays, rank_rows, rows_of_results
from tests.support.spread import BACKENDS, KERNELS, assert_same, mesh_of, offsets, value_and_gradients
from zigzag_jax import launch
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.problem import ArraySpec, make_problem

SMALL = Case(name="jax-small", world_size=2, lengths=(12, 0, 20), heads=4, kv_heads=2, padding=2)
BFLOAT16 = dataclasses.replace(SMALL, dtype="bfloat16", head_dim=hopper_head_dim(SMALL.head_dim))
USUAL = BFLOAT16 if RUNS else SMALL
RING = Case(name="jax-ring", world_size=4, lengths=(24, 8, 40), heads=4, kv_heads=2)


def jax_arrays(case, rank=1, seed=0):
    """q, k, v, dout, dlse as `rank` holds them, K/V gathered."""
    *arrays, dlse = rank_arrays(case, make_inputs(case, seed), rank)
    return *(jnp.asarray(x, case.dtype) for x in arrays), jnp.asarray(dlse)


def attention(case, backend):
    """`(q, k, v, cu_seqlens or batch, rank) -> out, lse` of one rank."""

    def call(q, k, v, cu_seqlens, rank):
        return zigzag_jax.zigzag_attention_gathered(
            q, k, v, cu_seqlens, rank, case.world_size, causal=case.causal, softmax_scale=case.softmax_scale,
            return_lse=True, backend=backend,
        )  # fmt: skip

    return call


def launches(function, *args):
    """Kernel launches in `function` as JAX lowers it: XLA might still merge those that differ in nothing."""
    lines = jax.jit(function).lower(*args).as_text().splitlines()
    return sum("custom_call" in line and ("python" in line or "triton" in line) for line in lines)


@pytest.mark.parametrize("case", [SMALL, BFLOAT16], ids=lambda case: case.dtype)
def test_eager_calls_take_numpy_arrays_and_give_the_bits_of_jit(case):
    function = value_and_gradients(attention(case, KERNELS))
    arrays = jax_arrays(case)
    with plan.use_planner(RememberingPlanner()) as planner:
        eager = function(*map(np.asarray, arrays), np.asarray(case.cu_seqlens, np.int32), 1)
        assert_same(eager, jax.jit(function)(*arrays, offsets(case), jnp.int32(1)))
    if case is BFLOAT16:
        assert_kernels_for_hopper(planner, PAIR)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_arrays_lengths_and_ranks(backend):
    case = USUAL if backend == KERNELS else SMALL
    batch = [jax_arrays(case, rank, seed=rank) for rank in (0, 1)]
    stacked = [jnp.stack(arrays) for arrays in zip(*batch, strict=True)]
    lengths = jnp.asarray([case.cu_seqlens, [0, 4, 28, 32]], jnp.int32)
    ranks = jnp.arange(2, dtype=jnp.int32)
    function = jax.jit(value_and_gradients(attention(case, backend)))
    together = jax.jit(jax.vmap(function))(*stacked, lengths, ranks)
    apart = [function(*arrays, *rest) for arrays, *rest in zip(batch, lengths, ranks, strict=True)]
    for result, wanted in zip(together, zip(*apart, strict=True), strict=True):
        # Kernels follow one another and give the same bits; the reference becomes one larger computation.
        np.testing.assert_allclose(result, jnp.stack(wanted), rtol=0, atol=0 if backend == KERNELS else 1e-5)


def test_checkpoint_policy_saves_what_the_backward_needs():
    q, k, v, dout, _ = jax_arrays(USUAL)
    prepare = functools.partial(zigzag_jax.prepare_batch, world_size=USUAL.world_size, backend=KERNELS)
    batch = jax.jit(prepare)(offsets(USUAL), jnp.int32(1))

    def gradients(remat):
        def loss(q, k, v):
            out, lse = remat(attention(USUAL, KERNELS))(q, k, v, batch, 1)
            return jnp.sum(out * dout) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

        return jax.value_and_grad(loss, (0, 1, 2))

    save = jax.checkpoint_policies.save_only_these_names("zigzag_out", "zigzag_lse")
    plain, again, saved = (
        gradients(remat) for remat in (lambda f: f, jax.checkpoint, functools.partial(jax.checkpoint, policy=save))
    )
    assert [launches(function, q, k, v) for function in (plain, again, saved)] == [4, 5, 4]
    assert_same(jax.jit(saved)(q, k, v)[1], jax.jit(plain)(q, k, v)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["zigzag_out", "zigzag_lse"])
def test_remat_policies_know_the_results_by_name(name, backend, capsys):
    q, k, v, _, _ = jax_arrays(SMALL)

    def loss(q, k, v):
        out, lse = attention(SMALL, backend)(q, k, v, offsets(SMALL), jnp.int32(1))
        return jnp.sum(out**2) + jnp.sum(lse**2)

    policy = jax.checkpoint_policies.save_only_these_names(name)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(loss, policy=policy), q, k, v)
    shape = q.shape if name == "zigzag_out" else q.shape[1::-1]
    size = ",".join(map(str, shape))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if f"'{name}'" in line] == [f"f32[{size}]"]


def test_scan_over_layers_shares_one_batch():
    q, k, v, dout, _ = jax_arrays(SMALL)
    scales = jnp.asarray([1.0, 0.5, 2.0], jnp.float32)

    def loss(scales, cu_seqlens, rank, backend):
        batch = zigzag_jax.prepare_batch(cu_seqlens, rank, SMALL.world_size, backend=backend)

        def layer(carry, scale):
            return carry + attention(SMALL, backend)(carry, k, v * scale, batch, rank)[0], None

        return jnp.sum(jax.lax.scan(layer, q, scales)[0] * dout)

    results, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, backend=backend)))(scales, offsets(SMALL), jnp.int32(1))
        for backend in BACKENDS
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), results, expected)


def sharded(body, mesh, kv_spec):
    """`body(q, k, v, dout, dlse, cu_seqlens)` on every rank of `mesh`, with the checks of `shard_map` on."""
    in_specs = P("cp"), kv_spec, kv_spec, P("cp"), P(None, "cp"), P()
    out_specs = P("cp"), P(None, "cp"), P("cp"), kv_spec, kv_spec
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("replicated", [False, True])
def test_shard_map_gives_the_dense_gradients(replicated, backend):
    """K/V gathered in user code, or given whole to every rank: autodiff then owes the sum over the ranks."""
    mesh = mesh_of(RING.world_size)
    inputs = make_inputs(RING)
    rows = gathered_rows(RING)
    arrays = *(inputs[name][rows] for name in ("q", "k", "v", "dout")), inputs["dlse"][:, rows]

    def body(q, k, v, dout, dlse, cu_seqlens):
        rank = jax.lax.axis_index("cp")
        batch = zigzag_jax.prepare_batch(cu_seqlens, rank, RING.world_size, backend=backend)

        def attend(q, k, v):
            if not replicated:
                k, v = jax.lax.all_gather((k, v), "cp", tiled=True)
            return attention(RING, backend)(q, k, v, batch, rank)

        return value_and_gradients(attend)(q, k, v, dout, dlse)

    results = sharded(body, mesh, P() if replicated else P("cp"))(*arrays, offsets(RING))
    expected, straightforward = (
        rows_of_results(batch_results(RING, inputs, arithmetic), rows)
        for arithmetic in (oracle.EXACT, oracle.straightforward(RING.dtype))
    )
    for name, result in zip(RESULTS, results, strict=True):
        assert_close(name, result, expected[name], straightforward[name])


def test_gradient_of_shard_map_of_vmap_on_two_mesh_axes():
    """Sequences split over "cp", a batch dimension over "dp", each device mapping over its share of it."""
    mesh = mesh_of(2, SMALL.world_size, names=("dp", "cp"))
    stacked = [jnp.stack([scale * x for scale in (1.0, 0.5, 2.0, -1.0)]) for x in jax_arrays(SMALL)[:3]]
    q, k, v = jnp.concatenate([stacked[0]] * SMALL.world_size, 1), *stacked[1:]
    lengths = jnp.asarray([SMALL.cu_seqlens, [0, 4, 28, 32]] * 2, jnp.int32)

    def loss(backend, q, k, v):
        def body(q, k, v, lengths):
            rank = jax.lax.axis_index("cp")
            return jax.vmap(lambda *args: attention(SMALL, backend)(*args, rank)[0])(q, k, v, lengths)

        in_specs = P("dp", "cp"), P("dp"), P("dp"), P("dp")
        out = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P("dp", "cp"))(q, k, v, lengths)
        return jnp.sum(out**2)

    results, expected = (jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2)))(q, k, v) for name in BACKENDS)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_last_offset_changes_nothing(backend):
    function = jax.jit(value_and_gradients(attention(SMALL, backend)))
    arrays = jax_arrays(SMALL)
    padded = jnp.concatenate([offsets(SMALL), jnp.full(3, SMALL.cu_seqlens[-1], jnp.int32)])
    assert_same(function(*arrays, padded, 1), function(*arrays, offsets(SMALL), 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_traced_values_give_nan(backend):
    function = jax.jit(value_and_gradients(attention(SMALL, backend)))
    for cu_seqlens, rank in (
        ((0, 12, 12, 32), 2),
        ((0, 12, 12, 32), -1),
        ((0, 10, 12, 32), 1),  # uneven
        ((0, 12, 8, 32), 1),  # negative
        ((4, 12, 12, 32), 1),  # not from the start
        ((0, 12, 12, 40), 1),  # beyond the end
    ):
        results = function(*jax_arrays(SMALL), jnp.asarray(cu_seqlens, jnp.int32), jnp.int32(rank))
        assert all(jnp.isnan(result).all() for result in results), (cu_seqlens, rank)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_lengths_in_a_batch_dimension(backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 9, heads, 16), np.float32) for heads in (4, 2, 2))
    attend = functools.partial(zigzag_jax.zigzag_attention, return_lse=True, backend=backend)
    out, lse = attend(q, k, v)
    packed_out, packed_lse = attend(*(x.reshape(18, *x.shape[2:]) for x in (q, k, v)), np.array([0, 9, 18], np.int32))
    assert (out.shape, lse.shape) == ((2, 9, 4, 16), (2, 4, 9))
    assert_same((out.reshape(18, 4, 16), lse.swapaxes(0, 1).reshape(4, 18)), (packed_out, packed_lse))
    assert_same([zigzag_jax.zigzag_attention(q, k, v, backend=backend)], [out])


def test_shard_and_unshard_under_jit_with_a_traced_rank():
    case = SMALL
    x = make_inputs(case)["q"]
    parts = []
    for rank in range(case.world_size):
        part = jax.jit(zigzag_jax.shard, static_argnums=3)(x, offsets(case), jnp.int32(rank), case.world_size)
        rows = rank_rows(case, rank)
        assert_same([part], [x[rows]])
        positions = jax.jit(zigzag_jax.position_ids, static_argnums=(2, 3))(
            offsets(case), jnp.int32(rank), case.world_size, case.tokens
        )
        wanted = [oracle.rank_positions(length, rank, case.world_size) for length in case.lengths]
        assert_same([positions], [np.concatenate([*wanted, np.zeros(case.padding)])])
        assert positions.dtype == "int32"
        assert_same([zigzag_jax.position_ids(offsets(case), rank, case.world_size)], [np.concatenate(wanted)])
        parts.append(part)
    unshard = jax.jit(zigzag_jax.unshard, static_argnums=2)
    assert_same([unshard(jnp.concatenate(parts), offsets(case), case.world_size)], [x])
    assert_same([zigzag_jax.local_cu_seqlens(offsets(case), case.world_size)], [np.array(case.cu_seqlens) // 2])


def test_shard_inside_shard_map():
    mesh = mesh_of(RING.world_size)

    def body(x, cu_seqlens):
        rank = jax.lax.axis_index("cp")
        positions = zigzag_jax.position_ids(cu_seqlens, rank, RING.world_size, RING.tokens)
        return zigzag_jax.shard(x, cu_seqlens, rank, RING.world_size), positions

    x = make_inputs(RING)["k"]
    part, positions = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P("cp")))(x, offsets(RING))
    rows = gathered_rows(RING)
    starts = np.repeat(RING.cu_seqlens[:-1], RING.lengths)
    assert_same((part, positions), (x[rows], rows - starts[rows]))


def gathered(**changed):
    rng = np.random.default_rng(0)
    arguments = {
        "q": rng.standard_normal((8, 4, 16), np.float32),
        "k": rng.standard_normal((16, 2, 16), np.float32),
        "v": rng.standard_normal((16, 2, 16), np.float32),
        "cu_seqlens": np.array([0, 16], np.int32),
        "rank": 0,
        "world_size": 2,
    }
    return zigzag_jax.zigzag_attention_gathered(**arguments | changed)


def test_a_batch_prepared_for_the_reference_serves_the_kernels():
    batch = zigzag_jax.prepare_batch(np.array([0, 16], np.int32), 0, 2, backend="reference")
    assert_same([gathered(cu_seqlens=batch, backend=KERNELS)], [gathered(backend=KERNELS)])


@pytest.mark.parametrize(
    ("name", "before", "after", "advice"),
    [
        ("validate", (), (2,), "call this outside of jit"),
        ("pad_to_zigzag", (np.ones(8),), (2,), "call this outside of jit"),
        ("unpad", (np.ones(8),), (2,), "call this outside of jit"),
        ("position_ids", (), (0, 2), "give the number of local rows as `tokens`"),
    ],
)
def test_what_must_read_lengths_refuses_traced_ones(name, before, after, advice):
    function = getattr(zigzag_jax, name)
    with pytest.raises(ValueError, match=f"cu_seqlens: .* traced array; {advice}"):
        jax.jit(lambda cu_seqlens: function(*before, cu_seqlens, *after))(jnp.asarray([0, 8], jnp.int32))


def test_whether_lse_is_returned_cannot_be_traced():
    """As of any flag of Python in a traced function, JAX says so."""
    q, cu_seqlens = jnp.ones((8, 1, 16)), jnp.asarray([0, 8])
    attend = functools.partial(zigzag_jax.zigzag_attention_gathered, q, q, q, cu_seqlens, 0, 1, backend=KERNELS)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda flag: attend(return_lse=flag))(True)


@functools.cache
def forward_launch():
    described = ArraySpec((8, 1, 16), "float32", (16, 16))
    call = make_call_spec(head_dim=16, backend=KERNELS)
    problem = make_problem(*(described,) * 3, call, sequences=1, world_size=1, target=launch.target(KERNELS))
    found = []
    with pytest.raises(StopIteration):
        plan.forward(lambda launch, *_: found.append(launch) or next(iter(())), problem, None, None, None, None)
    return found[0]


def forward_arrays():
    return *(jnp.ones((8, 1, 16)),) * 4, jnp.zeros((3, 8), jnp.int32), None, None  # the fourth in place of sinks


def test_a_name_that_the_kernel_does_not_have_is_an_error():
    for change in (
        {"inputs": ("q", "v", "k", *forward_launch().inputs[3:])},
        {"constexprs": forward_launch().constexprs | {"CASUAL": True}},
        {"scalars": ()},
        {"outputs": forward_launch().outputs[::-1]},
    ):
        with pytest.raises(TypeError, match="attention_forward: expected arguments"):
            launch.run(dataclasses.replace(forward_launch(), **change), *forward_arrays())


@pytest.mark.skipif(GPU, reason="only the interpreter fills outputs")
def test_rows_that_no_program_writes_are_nan():
    for result in launch.run(dataclasses.replace(forward_launch(), grid=(0, 1, 1)), *forward_arrays()):
        assert jnp.isnan(result).all()


def test_interpreting_must_be_asked_for_before_triton_is_imported():
    assert any("needs TRITON_INTERPRET=1" in line for line in lines_of("interpret_unasked", JAX_PLATFORMS="cpu"))
