"""Lowers attention from JAX for an H100, which compiles every kernel, where there is neither a GPU nor PyTorch.

    python -m tests.programs.lowering gathered ranges methods hopper

In a process of its own: it compiles, where tests may interpret. "hopper" needs a Triton that those kernels run with.
"""

import argparse
import functools
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("TRITON_INTERPRET", None)

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zigzag_jax import launch, prepare_batch, zigzag_attention, zigzag_attention_gathered
from zigzag_kernels.hopper.family import HOPPER

CALL = "custom_call @triton_kernel_call"


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def lower_gathered(head_dim, sequences, packing=None, **options):
    """The module of one rank of two, forward and backward, with sinks if `options` ask for largest logits."""

    def step(q, k, v, cu_seqlens, rank, *sinks):
        batch = prepare_batch(cu_seqlens, rank, 2, **packing or {})
        attend = functools.partial(zigzag_attention_gathered, return_lse=True, **options)

        def call(q, k, v, *sinks):
            return attend(q, k, v, batch, rank, 2, **({"sinks": sinks[0]} if sinks else {}))

        results, pullback = jax.vjp(call, q, k, v, *sinks)
        return pullback(results)

    arrays = struct(64, 4, head_dim), struct(128, 2, head_dim), struct(128, 2, head_dim)
    numbers = struct(sequences + 1, dtype="int32"), struct(dtype="int32")
    numbers += (struct(4),) * ("return_max_logits" in options)
    checks = launch.export_disabled_checks()
    exported = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=checks)(*arrays, *numbers)
    return str(exported.mlir_module())


def gathered():
    for sequences in (0, 1, 3):
        assert lower_gathered(64, sequences).count(CALL) == 5


def ranges():
    """Two more kernels are for the gradient of sinks."""
    for sequences in (1, 3):
        lengths = jnp.full(sequences, 8, jnp.int32)
        window = {"window_size": (16, 0), "attention_chunk": 32, "softcap": 3.0, "return_max_logits": True}
        assert lower_gathered(64, sequences, {"lengths": lengths}, **window).count(CALL) == 7
        both = {"causal": False, "window_size": (8, 8), "layout": "row", "return_max_logits": True}
        packing = {"lengths": lengths, "layout": "row", "row_length": 64, "rows": 2}
        assert lower_gathered(64, sequences, packing, **both).count(CALL) == 7


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
        arrays = (struct(256, heads, 64) for heads in (4, 2, 2))
        text = mapped.trace(*arrays, struct(3, dtype="int32")).lower(lowering_platforms=("cuda",)).as_text()
        assert (text.count(CALL), text.count("output_operand_alias<")) in expected, method


def hopper():
    """Three of the five are for Hopper, and take memory for their descriptors."""
    os.environ[HOPPER.variable] = "1"
    launched, run = [], launch.run
    launch.run = lambda made, *arrays: launched.append(made) or run(made, *arrays)
    for head_dim in (64, 128):
        launched.clear()
        assert lower_gathered(head_dim, 2).count(CALL) == 5  # no problem that was planned before, with portable kernels
        assert sum(made.scratch > 0 for made in launched) == 3


PARTS = {part.__name__: part for part in (gathered, ranges, methods, hopper)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    options = parser.parse_args()
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    jax_triton = launch.import_jax_triton()
    assert os.environ.get("TRITON_CACHE_DIR") == cache_dir
    # There is no GPU here to ask.
    jax_triton.triton_call = functools.partial(jax_triton.triton_call, compute_capability=90)
    launch.choose_backend, launch.target = lambda backend: "triton", lambda backend: "9.0"
    for name in options.parts:
        PARTS[name]()
        print(name)


if __name__ == "__main__":
    main()
