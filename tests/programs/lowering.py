"""Lowers attention from JAX for an H100, which compiles every kernel, where there is neither a GPU nor PyTorch.

    python -m tests.programs.lowering gathered ranges methods segmented outside hopper

In a process of its own: it compiles, where tests may interpret. "hopper" needs a Triton that those kernels run with.
The heads of other parts are small, since compiling takes most of the time; `compile_portable` compiles larger ones.
"""

import argparse
import contextlib
import functools
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("TRITON_INTERPRET", None)

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zigzag_jax import (
    launch,
    lower_for,
    plan_documents,
    prepare_batch,
    segmented_attention,
    zigzag_attention,
    zigzag_attention_gathered,
)
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER

CALL = "custom_call @triton_kernel_call"
HEAD_DIM = 16


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def lower_gathered(head_dim, sequences, packing=None, rows=64, **options):
    """The module of one rank of two, forward and backward, with sinks if `options` ask for largest logits."""

    def step(q, k, v, cu_seqlens, rank, *sinks):
        batch = prepare_batch(cu_seqlens, rank, 2, **packing or {})
        attend = functools.partial(zigzag_attention_gathered, return_lse=True, **options)

        def call(q, k, v, *sinks):
            return attend(q, k, v, batch, rank, 2, **({"sinks": sinks[0]} if sinks else {}))

        results, pullback = jax.vjp(call, q, k, v, *sinks)
        return pullback(results)

    arrays = struct(rows, 4, head_dim), struct(2 * rows, 2, head_dim), struct(2 * rows, 2, head_dim)
    numbers = struct(sequences + 1, dtype="int32"), struct(dtype="int32")
    numbers += (struct(4),) * ("return_max_logits" in options)
    checks = launch.export_disabled_checks()
    exported = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=checks)(*arrays, *numbers)
    text = str(exported.mlir_module())
    assert "dot_general" not in text
    return text


def gathered():
    for sequences in (0, 1, 3):
        assert lower_gathered(HEAD_DIM, sequences).count(CALL) == 5
    # jax-triton passes a number of rows that is 1 as a constant, which kernels must take too.
    assert lower_gathered(HEAD_DIM, 1, rows=1, return_max_logits=True).count(CALL) == 7


def ranges():
    """Two more kernels are for the gradient of sinks."""
    for sequences in (1, 3):
        lengths = jnp.full(sequences, 8, jnp.int32)
        window = {"window_size": (16, 0), "attention_chunk": 32, "softcap": 3.0, "return_max_logits": True}
        assert lower_gathered(HEAD_DIM, sequences, {"lengths": lengths}, **window).count(CALL) == 7
        both = {"causal": False, "window_size": (8, 8), "layout": "row", "return_max_logits": True}
        packing = {"lengths": lengths, "layout": "row", "row_length": 64, "rows": 2}
        assert lower_gathered(HEAD_DIM, sequences, packing, **both).count(CALL) == 7


def methods():
    """Between four ranks. Tables, then four kernels for each of two windows, or delta and three for each of the places
    in the ring: the first, two in a loop, which JAX 0.10 writes once for both, and the last. In place are out, lse and
    dq of all but the first, in the ring dk and dv too."""
    for method, expected in (("allgather", {(9, 3)}), ("ring", {(11, 10), (14, 15)})):

        def step(q, k, v, cu_seqlens, method=method):
            options = {"axis_name": "cp", "method": method}
            batch = prepare_batch(cu_seqlens, **options)
            attend = functools.partial(zigzag_attention, heads_k_stride=1, return_lse=True, **options)
            results, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, batch), q, k, v)
            return pullback(results)

        mesh = jax.sharding.AbstractMesh((4,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
        mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("cp"),) * 3 + (P(),), out_specs=P("cp")))
        arrays = (struct(256, heads, HEAD_DIM) for heads in (4, 2, 2))
        text = mapped.trace(*arrays, struct(3, dtype="int32")).lower(lowering_platforms=("cuda",)).as_text()
        assert (text.count(CALL), text.count("output_operand_alias<")) in expected, method


def plans():
    """Whole documents and split ones of four ranks. Tables of both, then the kernels of the whole documents and of two
    windows: out, lse and dq of both windows are in place, and no kernel is given a part of q or of a result."""
    plan = plan_documents([70, 30, 20, 50, 40], 4, tokens=80, split_tokens=24, split_above=60)

    def step(q, k, v):
        batch = prepare_batch(plan, axis_name="cp", method="allgather")
        attend = functools.partial(zigzag_attention, heads_k_stride=1, return_lse=True, axis_name="cp")
        results, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, batch), q, k, v)
        return pullback(results)

    mesh = jax.sharding.AbstractMesh((4,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("cp"),) * 3, out_specs=P("cp")))
    arrays = (struct(4 * plan.tokens, heads, HEAD_DIM) for heads in (4, 2, 2))
    text = mapped.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert (text.count(CALL), text.count("output_operand_alias<")) == (14, 6)
    moves = "stablehlo.slice", "stablehlo.concatenate", "stablehlo.dynamic_slice", "stablehlo.dynamic_update_slice"
    moved = [line for line in text.splitlines() if any(move in line for move in moves)]
    assert any(f"x2x{HEAD_DIM}xbf16" in line for line in moved)  # rows of K/V that are sent
    assert not any(f"x4x{HEAD_DIM}x" in line for line in moved), moved  # q, out, dq


def hopper():
    """Three of the five are for Hopper, and take memory for their descriptors."""
    os.environ[HOPPER.variable] = "1"
    launched, run = [], launch.run
    launch.run = lambda made, *arrays: launched.append(made) or run(made, *arrays)
    assert lower_gathered(128, 2).count(CALL) == 5  # no problem that was planned before, with portable kernels
    assert sum(made.scratch > 0 for made in launched) == 3
    for head_dim in (64, 128):
        # Three windows: out, lse and dq of all but the first are in place, and the sums of dQ of each.
        text = lower_windows(head_dim)
        assert (text.count(CALL), text.count("output_operand_alias<")) == (1 + 3 + 3 * 4, 2 * 3 + 3)


def lower_windows(head_dim):
    """The module of an all-gather of one KV head at a time, whose gradients one kernel computes."""
    os.environ[rules.TURNS] = "1"

    def step(q, k, v, cu_seqlens):
        batch = prepare_batch(cu_seqlens, axis_name="cp", method="allgather")
        attend = functools.partial(zigzag_attention, heads_k_stride=1, return_lse=True, axis_name="cp")
        results, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, batch), q, k, v)
        return pullback(results)

    mesh = jax.sharding.AbstractMesh((4,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("cp"),) * 3 + (P(),), out_specs=P("cp")))
    arrays = (struct(256, heads, head_dim) for heads in (6, 3, 3))
    text = mapped.trace(*arrays, struct(3, dtype="int32")).lower(lowering_platforms=("cuda",)).as_text()
    del os.environ[rules.TURNS]
    return text


def segmented():
    """On a mesh of GPUs that are not here, for two kinds of GPUs in turn."""
    step, arrays = segmented_step()
    texts = []
    for target in ("8.0", "9.0"):
        with lower_for(target):
            texts.append(step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text())
        assert texts[-1].count(CALL) == 5
        assert "dot_general" not in texts[-1]
    assert texts[0] != texts[1]


def outside():
    """Behind a block of `lower_for` dense attention is not lowered for a GPU, unless its backend is named."""
    step, arrays = segmented_step()
    with lower_for("9.0"):
        step.trace(*arrays)
    refusal = ""
    try:
        step.trace(*arrays).lower(lowering_platforms=("cuda",))
    except RuntimeError as error:
        refusal = str(error)
    assert "backend: expected lower_for(target) around this" in refusal, refusal
    step, arrays = segmented_step(backend="reference")
    with lower_for("9.0"):
        assert "dot_general" in step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def unplugged():
    """Without JAX's plugin for CUDA the error says what to install."""
    step, arrays = segmented_step()
    refusal = ""
    try:
        step.trace(*arrays)
    except RuntimeError as error:
        refusal = str(error)
    assert "backend: 'triton' needs JAX's plugin for CUDA" in refusal, refusal


def segmented_step(**options):
    """A step with gradients on two by two devices, and the shapes of its arguments."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def loss(q, k, v, segment_ids):
        options_of_rows = {"mesh": mesh, "batch_axis": "data", "max_segments": 3}
        return segmented_attention(q, k, v, segment_ids, **options_of_rows, **options).sum()

    arrays = [struct(4, 256, heads, HEAD_DIM) for heads in (4, 2, 2)]
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))), (*arrays, struct(4, 256, dtype="int32"))


PARTS = {part.__name__: part for part in (gathered, ranges, methods, plans, segmented, outside, unplugged, hopper)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    options = parser.parse_args()
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    if "unplugged" not in options.parts:
        launch.import_jax_triton()
    assert os.environ.get("TRITON_CACHE_DIR") == cache_dir
    for name in options.parts:
        with contextlib.nullcontext() if name == "outside" else lower_for("9.0"):
            PARTS[name]()
        print(name)


if __name__ == "__main__":
    main()
