"""Launches of Gluon kernels: Triton compiles them, and jaxlib's custom call for Triton kernels runs them.

jax-triton launches all other kernels, but cannot launch Gluon kernels, for these reasons:

- jax-triton 0.3 compiles every kernel as plain Triton, and provides no global memory, where the kernels make their
  descriptors for the copy engine. 0.4 concludes that Triton 3.6 has no NVIDIA backend, because its driver lacks
  `TMA_TF32`.
- 0.4 sends Gluon modules through the passes of plain Triton (`make_ttir`, `make_ttgir` instead of `gluon_to_ttgir`),
  which wait for every matrix instruction as soon as it is issued.
- 0.4 starts `num_warps` warps. A warp-specialised kernel needs the warps of all its partitions: the `num_warps` that
  compilation leaves in the metadata.
- From 0.11.1 on jaxlib allocates the global memory at each launch. That fails in a CUDA graph, and XLA makes a graph of
  five kernels in a row (CUDA_ERROR_NOT_SUPPORTED).

Therefore this module adds the global memory to the results, which XLA allocates. A Triton kernel has two hidden
parameters behind its own, `global_scratch` and `profile_scratch`. jaxlib appends null pointers for both to the
parameters that it gets, and the driver reads as many parameters as the kernel declares. This module passes the memory
as the last parameter, so that it becomes `global_scratch`, and the first null pointer becomes `profile_scratch`.
"""

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from zigzag_kernels.launch import Launch

CUSTOM_CALL = "triton_kernel_call_ffi"
POINTER_KINDS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}
_ALIGNED, _SCRATCH_ALIGNED = 16, 128  # bytes that kernels rely on; XLA's buffers begin at larger multiples


def call(launch: Launch, outputs: tuple, arrays: tuple, aliases: dict[int, int]) -> tuple:
    """Execute `launch` on `arrays` and return results of the shapes and dtypes `outputs`.

    `aliases` maps the number of an input to the number of the output that is written in its memory.
    """
    results = *outputs, jax.ShapeDtypeStruct((launch.scratch * math.prod(launch.grid),), jnp.int8)
    execute = jax.ffi.ffi_call(CUSTOM_CALL, results, input_output_aliases=aliases)
    return tuple(execute(*arrays, opaque=kernel_call(launch, arrays))[:-1])


def kernel_call(launch: Launch, arrays: tuple) -> bytes:
    """Return the operand of jaxlib's custom call: the kernel, its grid and its parameters in order."""
    from jaxlib import gpu_triton

    inputs, outputs = (tuple(POINTER_KINDS[str(x.dtype)] for x in group) for group in (arrays, launch.outputs))
    kinds = *inputs, *("i32" for _ in launch.scalars), *outputs
    constexprs, options = tuple(launch.constexprs.items()), (launch.num_warps, launch.num_stages)
    kernel = compile_kernel(launch.kernel, launch.target, kinds, constexprs, *options)
    metadata = kernel.metadata
    if metadata.global_scratch_size > launch.scratch or metadata.global_scratch_align > _SCRATCH_ALIGNED:
        raise RuntimeError(
            f"{metadata.name}: expected at most {launch.scratch} bytes of scratch memory at multiples of "
            f"{_SCRATCH_ALIGNED}, got {metadata.global_scratch_size} at {metadata.global_scratch_align}"
        )
    parameters = [gpu_triton.create_array_parameter(0, _ALIGNED) for _ in inputs]
    parameters += [gpu_triton.create_scalar_parameter(value, "i32") for value in launch.scalars.values()]
    parameters += [gpu_triton.create_array_parameter(0, _ALIGNED) for _ in outputs]
    parameters += [gpu_triton.create_array_parameter(0, _SCRATCH_ALIGNED)]
    module = gpu_triton.TritonKernel(
        metadata.name, metadata.num_warps, 1, metadata.shared, kernel.asm["ptx"], "", _capability(launch.target)
    )
    return zlib.compress(gpu_triton.TritonKernelCall(module, *launch.grid, parameters).to_proto(metadata.name, b""))


@functools.cache
def compile_kernel(
    kernel: Any, target: str, kinds: tuple[str, ...], constexprs: tuple, num_warps: int, num_stages: int
) -> Any:
    """Compile the Gluon `kernel` for arguments of these `kinds`, with aligned pointers, as a launch in PyTorch does."""
    signature = dict(zip(kernel.arg_names, kinds, strict=False)) | {name: "constexpr" for name, _ in constexprs}
    aligned = {(i,): [["tt.divisibility", _ALIGNED]] for i, kind in enumerate(kinds) if kind[0] == "*"}
    source = GluonASTSource(kernel, signature, dict(constexprs), aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, GPUTarget("cuda", _capability(target), 32), options)


def _capability(target: str) -> int:
    return int(target.replace(".", ""))
