"""Calls of `zigzag_jax` that are traced, forward and backward: one rank of each case, every public way."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zigzag_jax import prepare_batch, zigzag_attention, zigzag_attention_gathered

PACKAGE = "zigzag_jax"


def make(output) -> jax.Array:
    """Return what a launch would have written."""
    return jnp.zeros(output.shape, output.dtype)


def calls(case) -> dict[str, Callable[[], None]]:
    """Return {name: one traced training step}."""
    world_size = case.world_size

    def gathered(return_lse=False, **options):
        def attend(q, k, v, cu_seqlens, rank):
            options_of_call = {"causal": case.causal, "return_lse": return_lse, **options}
            return zigzag_attention_gathered(q, k, v, cu_seqlens, rank, world_size, **options_of_call)

        kv = array(case, case.total, case.kv_heads)
        jax.eval_shape(step(attend), array(case, case.tokens, case.heads), kv, kv, lengths(case), rank())

    def between_ranks(layers=1, method="allgather", **options):
        def attend(q, k, v, cu_seqlens):
            batch = prepare_batch(cu_seqlens, axis_name="cp", method=method) if layers > 1 else cu_seqlens
            for _ in range(layers):
                q = zigzag_attention(q, k, v, batch, axis_name="cp", method=method, causal=case.causal, **options)
            return q

        mesh = jax.sharding.AbstractMesh((world_size,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = {"in_specs": (P("cp"),) * 3 + (P(),), "out_specs": P("cp")}
        # The recorder's arrays do not say along which axes they vary.
        mapped = jax.shard_map(step(attend), mesh=mesh, check_vma=False, **specs)
        q, kv = array(case, case.total, case.heads), array(case, case.total, case.kv_heads)
        jax.eval_shape(mapped, q, kv, kv, lengths(case))

    def one_device(**options):
        def attend(q, k, v, cu_seqlens):
            return zigzag_attention(q, k, v, cu_seqlens, causal=case.causal, **options)

        kv = array(case, case.tokens, case.kv_heads)
        jax.eval_shape(step(attend), array(case, case.tokens, case.heads), kv, kv, lengths(case))

    made = {
        "gathered": lambda: gathered(return_lse=True),
        "gathered, in any order": lambda: gathered(deterministic=False),
    }
    if world_size == 1:
        return made | {"one device": lambda: one_device(softmax_scale=0.25)}
    one_head = {"heads_k_stride": 1, "grad_reduce_dtype": case.dtype}
    return made | {
        "all-gather": lambda: between_ranks(return_lse=True),
        "all-gather, a head at a time": lambda: between_ranks(**one_head),
        "all-gather, two layers": lambda: between_ranks(layers=2),
        "ring": lambda: between_ranks(method="ring", return_lse=True),
        "ring, own dtype": lambda: between_ranks(method="ring", grad_reduce_dtype=case.dtype),
        "ring, two layers": lambda: between_ranks(method="ring", layers=2),
    }


def step(attend: Callable) -> Callable:
    """Return the function of the same arguments that gives the gradients of q, k and v."""

    def gradients(q, k, v, *others):
        results, pullback = jax.vjp(functools.partial(_behind, attend, others), q, k, v)
        return pullback(results)

    return gradients


def _behind(attend, others, q, k, v):
    return attend(q, k, v, *others)


def array(case, rows: int, heads: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, heads, case.head_dim), case.dtype)


def lengths(case) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(case.lengths) + 1,), "int32")


def rank() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1,), "int32")
