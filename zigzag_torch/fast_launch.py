"""The fast path into Triton's launcher, and all private symbols of PyTorch: correctness never depends on this file.

`launch` and `dispatch` work without this file too, with more host time per call: it cannot be imported under a release
of PyTorch that lacks one of these symbols. A compiled kernel is started again by the function in C that Triton's own
call comes to, if this release of Triton is known.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._C._autograd import _profiler_enabled as profiler_runs
from torch._C._functorch import is_functorch_wrapped_tensor as belongs_to_transform
from torch.autograd.function import _SingleLevelFunction as Function

if TYPE_CHECKING:
    from zigzag_kernels.plan import Launch

__all__ = [
    "DeviceGuard",
    "Function",
    "belongs_to_transform",
    "dispatch_modes",
    "empty_on_gpu",
    "function_modes",
    "is_negated",
    "is_zero_tensor",
    "profiler_runs",
    "remember",
    "start_again",
    "traced_graph",
    "transforms_run",
]

_private = cast(Any, torch._C)
DeviceGuard = torch.cuda._DeviceGuard
# Code that PyTorch has compiled allocates by this function, in less than half of the host's time for torch.empty.
empty_on_gpu = _private._dynamo.guards._empty_strided_cuda
dispatch_modes, function_modes = _private._len_torch_dispatch_stack, _private._len_torch_function_stack
traced_graph, transforms_run = _private._get_tracing_state, _private._are_functorch_transforms_active
is_negated, is_zero_tensor = torch.Tensor.is_neg, torch.Tensor._is_zerotensor

FORMAT_3_6 = "iiiKKppOOOOOO"
"""Arguments that Triton 3.6 declares for its function in C, before the arguments of the kernel."""
LATER_RELEASES = ("3.7.", "3.8.", "3.9.")
"""Releases of Triton that have the function that came after it, whose arguments `_find_c_function` gives."""


def start_again(launch: "Launch", inputs: list, outputs: list, scratch: Callable[[int], torch.Tensor]) -> bool:
    """Start the kernel that `remember` was given for such arrays; False if there is none yet.

    Triton compiles one kernel for inputs of the same dtypes on the same devices, aligned alike, under the same
    settings. Outputs are among the inputs, or new and so always aligned alike.
    """
    knobs, kernels = _remembered(launch)
    pointers = [x.data_ptr() for x in inputs]
    start = kernels.get(_key(knobs, inputs, pointers))
    if start is None:
        return False
    start(scratch, *pointers, *launch.scalars.values(), *[x.data_ptr() for x in outputs])
    return True


def remember(launch: "Launch", inputs: list, compiled: Any, through_triton: Callable[..., None]) -> None:
    """Keep the kernel that Triton has `compiled` and started, for `start_again`.

    `through_triton` starts it too: without Triton's look at each argument, but with all hooks.
    """
    knobs, kernels = _remembered(launch)
    constants = [launch.constexprs[name] for name in launch.kernel.arg_names if name in launch.constexprs]
    start = _make_start(compiled, launch.grid, inputs[0].get_device(), constants, through_triton)
    kernels[_key(knobs, inputs, [x.data_ptr() for x in inputs])] = start


@functools.lru_cache(maxsize=4096)
def _remembered(launch: "Launch") -> tuple[Any, dict[tuple, Callable[..., None]]]:
    """Return (Triton's settings, the functions that start the kernels of `launch`, by `_key`)."""
    from triton import knobs

    return knobs, {}


def _key(knobs: Any, inputs: list, pointers: list[int]) -> tuple:
    settings = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    return *settings, *[x.dtype for x in inputs], *[x.get_device() for x in inputs], *[x & 15 for x in pointers]


def _make_start(
    compiled: Any, grid: tuple[int, int, int], device: int, constants: list, through_triton: Callable[..., None]
) -> Callable[..., None]:
    """Return `start(scratch, *arguments)` for pointers and numbers, on the current `device`.

    It calls Triton's function in C, if that is known, without the preparations for hooks; if there are hooks, the call
    is Triton's.
    """
    import triton
    from triton import knobs

    function = _find_c_function(compiled, grid, triton.__version__)
    if function is None:
        return lambda _, *arguments: through_triton(*arguments, *constants)
    size = compiled.run.global_scratch_size * compiled.run.num_ctas * math.prod(grid)
    stream_of, runtime = cast(Any, triton.runtime.driver.active).get_current_stream, knobs.runtime

    def start(scratch, *arguments) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            through_triton(*arguments, *constants)
            return
        function(stream_of(device), scratch(size) if size else None, *arguments, *constants)

    return start


def _find_c_function(compiled: Any, grid: tuple[int, int, int], release: str) -> Callable[..., None] | None:
    """Return `function(stream, memory, *arguments)` by Triton's function in C; None for an unknown `release`."""
    from triton.backends.nvidia import driver

    launcher = compiled.run
    if type(launcher) is not driver.CudaLauncher or launcher.profile_scratch_size:
        return None
    launch, metadata = launcher.launch, compiled.packed_metadata
    flags = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    if getattr(driver, "_BASE_ARGS_FORMAT", None) == FORMAT_3_6:
        return lambda stream, memory, *arguments: launch(
            *grid, stream, *flags, memory, None, metadata, None, None, None, *arguments
        )
    if not release.startswith(LATER_RELEASES) or getattr(launcher, "gsan_enabled", False):
        return None
    kinds = launcher.arg_annotations, launcher.kernel_signature
    return lambda stream, memory, *arguments: launch(
        *grid, stream, *flags, metadata, None, None, None, memory, None, *kinds, arguments
    )
