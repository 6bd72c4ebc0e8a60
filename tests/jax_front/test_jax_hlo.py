"""What XLA makes of a step around the kernels: nothing as large as K/V is copied or rearranged."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.support.hopper import PAIR, assert_kernels_for_hopper, hopper_head_dim
from tests.support.machine import GPU
from tests.support.planners import RememberingPlanner
from tests.support.spread import mesh_of
from zigzag_jax import make_zigzag_attention, plan_documents, zigzag_attention, zigzag_attention_gathered
from zigzag_kernels.plan import use_planner
from zigzag_kernels.segments.columns import SEGMENT_FIELDS

WORLD_SIZE, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 128, 4, 2, hopper_head_dim(64)
DTYPE = "bfloat16" if GPU else "float32"  # XLA's collectives on a CPU convert all others, there and back
OFFSETS = jax.ShapeDtypeStruct((3,), "int32")
MOVES = "copy", "copy-start", "transpose", "concatenate", "pad", "slice", "dynamic-slice", "dynamic-update-slice"


def moved(function, *shapes, least, kinds=MOVES):
    """Operations of the compiled `function`, also inside of fusions, of these `kinds` with `least` elements or more."""
    text = jax.jit(function).lower(*shapes).compile().as_text()
    operations = re.findall(rf" = \(?\w+\[([\d,]*)\]\S* ({'|'.join(kinds)})\(", text)
    return [(shape, kind) for shape, kind in operations if math.prod(map(int, filter(None, shape.split(",")))) >= least]


def array(tokens, heads):
    return jax.ShapeDtypeStruct((tokens, heads, HEAD_DIM), DTYPE)


def test_a_move_is_seen():
    k = array(TOKENS, KV_HEADS)
    for move in (lambda x: jnp.concatenate([x, 2 * x]), lambda x: jnp.sin(x.transpose(1, 0, 2)), lambda x: x[1:] * 2):
        assert moved(move, k, least=(TOKENS - 1) * KV_HEADS * HEAD_DIM)
        assert not moved(move, k, least=2 * TOKENS * KV_HEADS * HEAD_DIM + 1)


def test_gathered_keys_are_read_in_place_in_both_directions(kernel_backend):
    def step(q, k, v, cu_seqlens, dout):
        def attend(q, k, v):
            return zigzag_attention_gathered(q, k, v, cu_seqlens, 1, WORLD_SIZE, backend=kernel_backend)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(dout)

    q, kv = array(TOKENS, HEADS), array(WORLD_SIZE * TOKENS, KV_HEADS)
    with use_planner(RememberingPlanner()) as planner:
        assert moved(step, q, kv, kv, OFFSETS, q, least=TOKENS * HEADS * HEAD_DIM) == []
    assert_kernels_for_hopper(planner, PAIR)


@pytest.mark.multigpu
@pytest.mark.parametrize("method", ["allgather", "ring"])
def test_both_parts_of_a_plan_read_queries_and_write_results_in_place(method, kernel_backend):
    """Only K/V of split documents and their gradients are copied."""
    if jax.device_count() < WORLD_SIZE:
        pytest.skip(f"needs {WORLD_SIZE} devices")
    plan = plan_documents([96, 40, 50, 60, 30], WORLD_SIZE, tokens=TOKENS + 24, split_tokens=48, split_above=90)
    attention = make_zigzag_attention(mesh_of(WORLD_SIZE), method=method, backend=kernel_backend)
    q, kv = (array(WORLD_SIZE * plan.tokens, heads) for heads in (HEADS, KV_HEADS))

    def step(q, k, v, dout):
        out, pullback = jax.vjp(lambda *x: attention(*x, attention.prepare_batch(plan)), q, k, v)
        return out, pullback(dout)

    assert moved(step, q, kv, kv, q, least=plan.split_tokens * KV_HEADS * HEAD_DIM)  # sees K/V that are to be sent
    assert moved(step, q, kv, kv, q, least=plan.whole_tokens * HEADS * HEAD_DIM) == []


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_gradient_of_lse_is_made_only_if_lse_was_asked_for(return_lse, kernel_backend):
    def step(q, k, v, cu_seqlens, dout):
        def attend(q, k, v):
            options = {"backend": kernel_backend, "return_lse": return_lse}
            results = zigzag_attention_gathered(q, k, v, cu_seqlens, 1, WORLD_SIZE, **options)
            return results[0] if return_lse else results

        return jax.vjp(attend, q, k, v)[1](dout)

    q, kv = array(TOKENS, HEADS), array(WORLD_SIZE * TOKENS, KV_HEADS)
    made = moved(step, q, kv, kv, OFFSETS, q, least=TOKENS * HEADS, kinds=["broadcast"])
    assert [kind for _, kind in made] == ["broadcast"] * return_lse


@pytest.mark.parametrize("stride", [1, 2])
def test_what_an_all_gather_brings_is_read_in_place_in_both_directions(stride, kernel_backend):
    """One GPU gathers nothing. A CPU plays four ranks: what one sends, and gets of dK/dV, is less than that."""
    ranks = 1 if GPU else 4
    mesh = jax.make_mesh((ranks,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:ranks])

    @jax.shard_map(mesh=mesh, in_specs=(P("cp"), P("cp"), P("cp"), P(), P("cp")), out_specs=P("cp"))
    def step(q, k, v, cu_seqlens, dout):
        def attend(q, k, v):
            options = {"axis_name": "cp", "heads_k_stride": stride, "backend": kernel_backend}
            return zigzag_attention(q, k, v, cu_seqlens, **options)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    q, kv = array(ranks * TOKENS, HEADS), array(ranks * TOKENS, KV_HEADS)
    assert moved(step, q, kv, kv, OFFSETS, q, least=ranks * TOKENS * stride * HEAD_DIM) == []


@pytest.mark.skipif(GPU, reason="eight devices of a CPU")
def test_a_ring_copies_keys_in_every_other_hop_at_most():
    """A trip of its loop takes two hops, which end with K/V in the buffers that they began with."""
    ranks = 8
    mesh = jax.make_mesh((ranks,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=(P("cp"), P("cp"), P("cp"), P(), P("cp")), out_specs=P("cp"))
    def step(q, k, v, cu_seqlens, dout):
        def attend(q, k, v):
            return zigzag_attention(q, k, v, cu_seqlens, axis_name="cp", method="ring", backend="interpret")

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    q, kv = array(ranks * TOKENS, HEADS), array(ranks * TOKENS, KV_HEADS)
    text = jax.jit(step).lower(q, kv, kv, OFFSETS, q).compile().as_text()
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    found = []
    for name, body in re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        kinds = re.findall(rf"\[{TOKENS},{KV_HEADS},{HEAD_DIM}\]\S* (copy|collective-permute)\(", body)
        if name in loops and "collective-permute" in kinds:
            found.append((kinds.count("copy"), kinds.count("collective-permute")))
    (forward, sent), (backward, sent_with_gradients) = sorted(found, key=lambda counts: counts[1])
    assert forward <= sent / 2  # K and V of every hop are sent, and every other hop copied
    assert backward <= sent_with_gradients / 4  # dK and dV are sent too


@pytest.mark.parametrize("method", [None, "allgather", "ring"])
def test_no_second_q_k_and_v_are_kept_for_the_backward_pass(method, kernel_backend):
    """What is kept of them are the arguments, which the caller has anyway."""
    attend = functools.partial(zigzag_attention, backend=kernel_backend)
    if method:
        mesh = jax.sharding.AbstractMesh((2,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
        attend = make_zigzag_attention(mesh, method=method, backend=kernel_backend)
    q, kv = array(TOKENS, HEADS), array(TOKENS, KV_HEADS)
    traced = jax.make_jaxpr(lambda *qkv: jax.vjp(lambda *x: attend(*x), *qkv))(q, kv, kv).jaxpr
    kept = set(traced.outvars)  # out, and what the pullback holds
    assert kept >= set(traced.invars)
    rows = [x for x in kept if math.prod(x.aval.shape) >= TOKENS * KV_HEADS * HEAD_DIM]
    assert len(rows) == len(traced.invars) + 1


@pytest.mark.multigpu
@pytest.mark.parametrize("form", ["halo", "plan", "plan and halo"])
def test_tables_of_a_prepared_batch_are_passed_to_kernels_whole(form, kernel_backend):
    """XLA would copy each part of a table in every layer."""
    if jax.device_count() < WORLD_SIZE:
        pytest.skip(f"needs {WORLD_SIZE} devices")
    method = "halo" if "halo" in form else "allgather"
    options = {"method": method, "backend": kernel_backend} | ({"window_size": (3, 0)} if method == "halo" else {})
    attention = make_zigzag_attention(mesh_of(WORLD_SIZE), **options)
    plan = plan_documents([96, 40, 50, 60, 30], WORLD_SIZE, tokens=TOKENS + 24, split_tokens=48, split_above=90)
    given, tokens = (jnp.array([0, 64, 256]), TOKENS) if form == "halo" else (plan, plan.tokens)
    batch = jax.eval_shape(lambda: attention.prepare_batch(given))

    def step(q, k, v, batch):
        out, pullback = jax.vjp(lambda *x: attention(*x, batch), q, k, v)
        return pullback(out)

    q, kv = (array(WORLD_SIZE * tokens, heads) for heads in (HEADS, KV_HEADS))
    cuts = re.compile(r"\w+:i32\[[\d,]+\](\{[^}]*\})? = (slice|dynamic_slice|squeeze|gather|split|reshape)\[")
    table = f"{SEGMENT_FIELDS}]"
    text = str(jax.make_jaxpr(step)(q, kv, kv, batch))
    assert table in text
    assert [line for line in text.splitlines() if cuts.search(line)] == []


@pytest.mark.multigpu
def test_the_forward_pass_with_halos_neither_cuts_nor_joins_rows(kernel_backend):
    """XLA would copy the messages, and the buffer of halos, in every layer."""
    if jax.device_count() < WORLD_SIZE:
        pytest.skip(f"needs {WORLD_SIZE} devices")
    attention = make_zigzag_attention(mesh_of(WORLD_SIZE), method="halo", window_size=(3, 0), backend=kernel_backend)
    batch = jax.eval_shape(lambda: attention.prepare_batch(jnp.array([0, 64, 256])))
    q, kv = (array(WORLD_SIZE * TOKENS, heads) for heads in (HEADS, KV_HEADS))
    text = str(jax.make_jaxpr(attention)(q, kv, kv, batch))
    assert "ppermute" in text
    cuts = re.compile(rf"\[\d+,\d+,{HEAD_DIM}\]\S* = (slice|split|concatenate|dynamic_update_slice)\[")
    assert [line for line in text.splitlines() if cuts.search(line)] == []
