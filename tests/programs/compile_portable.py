"""Compiles the portable kernels for a GPU, and checks that their shared memory is what the tile table expects.

    python -m tests.programs.compile_portable 9.0 128 bfloat16 plain | options | ring | halo

Needs no GPU: Triton brings its own assembler. Prints the name of each kernel. The last argument is one of `CALLS`.
"""

import sys
from dataclasses import replace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.problems import small_problem
from zigzag_kernels import plan
from zigzag_kernels.families import choose_tiles
from zigzag_kernels.modes import KVLayout, Layout
from zigzag_kernels.portable.family import PORTABLE

NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
TABLES = dict.fromkeys(
    ("segments", "sequences", "cu_seqlens", "rank", "lengths", "into_segments", "into_sequences"), "int32"
)
STATISTICS = dict.fromkeys(("lse", "dlse", "delta", "lse2", "into_lse", "sinks", "parts", "into_dsinks"), "float32")
OPTIONS = {
    "window_size": (127, -1), "softcap": 30.0, "has_sinks": True, "return_max_logits": True, "layout": Layout.ROW,
    "has_lengths": True,
}  # fmt: skip
CALLS = {
    "plain": ({}, {}),
    "options": (OPTIONS, {}),
    "halo": ({"window_size": (127, -1), "halo": 127, "halo_rows": 127}, {"kv_layout": KVLayout.HALO, "slot_rows": 127}),
    "ring": (OPTIONS | {"causal": False, "window_size": (-1, 9), "attention_chunk": 100}, {"kv_layout": KVLayout.PEER}),
}
"""Options of a call, and how its problem differs from that of `small_problem`."""


def compile_launch(launch, target, dtype):
    """The compiled kernel of `launch`, all of whose arrays begin at multiples of 16 bytes."""
    kinds = ["*" + NAMES[(TABLES | STATISTICS).get(name, dtype)] for name in launch.inputs]
    kinds += ["i32"] * len(launch.scalars) + ["*" + NAMES[output.dtype] for output in launch.outputs]
    signature = dict(zip(launch.kernel.arg_names, kinds, strict=False)) | dict.fromkeys(launch.constexprs, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind[0] == "*"}
    return triton.compile(
        ASTSource(launch.kernel, signature, launch.constexprs, aligned),
        target=GPUTarget("cuda", int(float(target) * 10), 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def main(target, head_dim, dtype, call):
    architecture = PORTABLE.architecture(target)
    options, changes = CALLS[call]
    problem = small_problem(head_dim, dtype, target)
    problem = replace(problem, call=replace(problem.call, **options), **changes)
    for kernel, launches in plan.plan_step(problem):
        for launch in launches:
            name, shared = launch.kernel.__name__, compile_launch(launch, target, dtype).metadata.shared
            if kernel:
                config = choose_tiles(kernel, head_dim, dtype, target)
                bound = PORTABLE.shared_memory(kernel, config, head_dim, dtype, architecture)
                assert shared <= bound <= architecture.shared_memory, (name, shared, bound)
            print(name)


if __name__ == "__main__":
    target, head_dim, dtype, call = sys.argv[1:]
    main(target, int(head_dim), dtype, call)
