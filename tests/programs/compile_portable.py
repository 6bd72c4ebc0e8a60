"""Compiles the portable kernels for a GPU, and checks that their shared memory is what the tile table expects.

    python -m tests.programs.compile_portable 9.0 128 bfloat16

Needs no GPU: Triton brings its own assembler. Prints the name of each kernel.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.problems import small_problem
from zigzag_kernels import plan
from zigzag_kernels.families import choose_tiles
from zigzag_kernels.portable.family import PORTABLE

NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
TABLES = dict.fromkeys(("segments", "sequences", "cu_seqlens", "rank"), "int32")
STATISTICS = dict.fromkeys(("lse", "dlse", "delta", "lse2", "into_lse"), "float32")


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


def main(target, head_dim, dtype):
    architecture = PORTABLE.architecture(target)
    for kernel, launches in plan.plan_step(small_problem(head_dim, dtype, target)):
        for launch in launches:
            name, shared = launch.kernel.__name__, compile_launch(launch, target, dtype).metadata.shared
            if kernel:
                config = choose_tiles(kernel, head_dim, dtype, target)
                bound = PORTABLE.shared_memory(kernel, config, head_dim, dtype, architecture)
                assert shared <= bound <= architecture.shared_memory, (name, shared, bound)
            print(name)


if __name__ == "__main__":
    target, head_dim, dtype = sys.argv[1:]
    main(target, int(head_dim), dtype)
