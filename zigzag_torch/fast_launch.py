"""The fast path into Triton's launcher, and all private symbols of PyTorch: correctness never depends on this file.

If a release of PyTorch lacks one of the symbols, the import of this file fails, and `launch` and `dispatch` work
without it, with more host time per call. To start a compiled kernel again, this file directly calls the C function that
Triton's own launcher would call, if it knows this release of Triton.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch._C._autograd import _profiler_enabled as profiler_runs
from torch._C._functorch import is_functorch_wrapped_tensor as belongs_to_transform
from torch.autograd.function import _SingleLevelFunction as Function

from zigzag_kernels.launch import inputs_by_name

if TYPE_CHECKING:
    from zigzag_kernels.launch import Launch, Output

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
    "remember_together",
    "start_again",
    "start_together",
    "traced_graph",
    "transforms_run",
]

_private = cast(Any, torch._C)
DeviceGuard = torch.cuda._DeviceGuard
# The function with which compiled PyTorch code allocates; it takes less than half of the host's time of torch.empty.
empty_on_gpu = _private._dynamo.guards._empty_strided_cuda
dispatch_modes, function_modes = _private._len_torch_dispatch_stack, _private._len_torch_function_stack
traced_graph, transforms_run = _private._get_tracing_state, _private._are_functorch_transforms_active
is_negated, is_zero_tensor = torch.Tensor.is_neg, torch.Tensor._is_zerotensor

_pointer_of, _dtype_of = torch.Tensor.data_ptr, operator.attrgetter("dtype")

FORMAT_3_6 = "iiiKKppOOOOOO"
"""The format of the arguments that Triton 3.6 declares for its C function, before the arguments of the kernel."""
LATER_RELEASES = ("3.7.", "3.8.", "3.9.")
"""Releases of Triton with the next version of the C function; `_find_c_function` has the arguments of both."""


def start_again(launch: "Launch", inputs: list, outputs: list, scratch: Callable[[int], torch.Tensor]) -> bool:
    """Start the kernel that an earlier launch with arrays of this kind compiled; return False if there is none.

    Triton compiles one kernel for all inputs with the same dtypes, device, alignment and settings. Outputs do not
    matter: they are among the inputs, or new arrays, which are always aligned.
    """
    remembered = _remembered(launch)
    pointers = [*map(_pointer_of, inputs)]
    start = remembered.starts.get(_key(remembered.knobs, inputs, pointers))
    if start is None:
        return False
    start(scratch, [*pointers, *remembered.scalars, *map(_pointer_of, outputs)])
    return True


def remember(launch: "Launch", inputs: list, compiled: Any, through_triton: Callable[..., None]) -> None:
    """Store the kernel that Triton has `compiled` and started, for `start_again`.

    `through_triton` starts the kernel with all of Triton's hooks, but without its checks of each argument.
    """
    remembered = _remembered(launch)
    constants = [launch.constexprs[name] for name in launch.kernel.arg_names if name in launch.constexprs]
    start = _make_start(compiled, launch.grid, inputs[0].get_device(), constants, through_triton)
    remembered.starts[_key(remembered.knobs, inputs, [*map(_pointer_of, inputs)])] = start


class _Remembered(NamedTuple):
    """The constants with which one launch starts again."""

    knobs: Any  # Triton's settings
    scalars: tuple[int, ...]
    starts: dict[tuple, Callable[..., None]]  # by `_key`, the function that starts the kernel


@functools.lru_cache(maxsize=4096)
def _remembered(launch: "Launch") -> _Remembered:
    from triton import knobs

    return _Remembered(knobs, tuple(launch.scalars.values()), {})


class _Together(NamedTuple):
    """The constants with which several launches start again, one after the other."""

    knobs: Any  # Triton's settings
    given: tuple[str, ...]  # names of the arrays that the caller passes
    new: "tuple[Output, ...]"  # the arrays that the launches make
    scalars: tuple[int, ...]
    # For each launch, the function that picks its arguments from (given pointers, new pointers, scalars).
    arguments: tuple[Callable[[tuple], tuple], ...]
    # By the `_key` of the given arrays, the function that starts the kernel of each launch.
    starts: dict[tuple, tuple[Callable[..., None], ...]]


@functools.lru_cache(maxsize=4096)
def _remembered_together(launches: "tuple[Launch, ...]") -> _Together:
    from triton import knobs

    new: dict[str, Output] = {}
    for launch in launches:
        new = {output.name: output for output in launch.outputs} | new
    names = [name.removeprefix("into_") for launch in launches for name in launch.inputs]
    given = tuple(dict.fromkeys(name for name in names if name not in new))
    places = {name: i for i, name in enumerate((*given, *new))}
    scalars, arguments = [], []
    for launch in launches:
        inputs = [places[name.removeprefix("into_")] for name in launch.inputs]
        numbers = range(len(places) + len(scalars), len(places) + len(scalars) + len(launch.scalars))
        outputs = [places[output.name] for output in launch.outputs]
        arguments.append(operator.itemgetter(*inputs, *numbers, *outputs))
        scalars += launch.scalars.values()
    return _Together(knobs, given, tuple(new.values()), tuple(scalars), tuple(arguments), {})


def start_together(
    launches: "tuple[Launch, ...]", arrays: dict[str, torch.Tensor], allocate: Callable, scratch: Callable
) -> dict[str, torch.Tensor] | None:
    """Start launches that `remember_together` has stored for arrays of this kind.

    Returns {name: new array}, or None if nothing is stored. `allocate` and `scratch` are functions of `launch`.
    """
    remembered = _remembered_together(launches)
    given = [arrays[name] for name in remembered.given]
    pointers = [*map(_pointer_of, given)]
    starts = remembered.starts.get(_key(remembered.knobs, given, pointers))
    if starts is None:
        return None
    new = {output.name: allocate(output, given[0]) for output in remembered.new}
    numbers = (*pointers, *map(_pointer_of, new.values()), *remembered.scalars)
    for start, arguments_of in zip(starts, remembered.arguments, strict=True):
        start(scratch, arguments_of(numbers))
    return new


def remember_together(
    launches: "tuple[Launch, ...]", arrays: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
) -> None:
    """Store the functions that started `launches` one by one, for `start_together`, if all of them are known."""
    remembered, starts = _remembered_together(launches), []
    for launch in launches:
        inputs = inputs_by_name(launch, {**arrays, **outputs})
        pointers = [*map(_pointer_of, inputs)]
        starts.append(_remembered(launch).starts.get(_key(remembered.knobs, inputs, pointers)))
    if None not in starts:
        given = [arrays[name] for name in remembered.given]
        key = _key(remembered.knobs, given, [*map(_pointer_of, given)])
        remembered.starts[key] = tuple(starts)


def _key(knobs: Any, inputs: list, pointers: list[int]) -> tuple:
    """Return the values that decide which compiled kernel a launch uses; all inputs are on one device."""
    bits = functools.reduce(operator.or_, pointers) & 15
    alignment = tuple(x & 15 for x in pointers) if bits else None
    settings = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    return *settings, inputs[0].get_device(), alignment, *map(_dtype_of, inputs)


def _make_start(
    compiled: Any, grid: tuple[int, int, int], device: int, constants: list, through_triton: Callable[..., None]
) -> Callable[..., None]:
    """Return a function `start(scratch, arguments)` for the current `device`; arguments are pointers and numbers.

    The function directly calls Triton's C function. If hooks are set, or the C function is unknown, it calls
    `through_triton` instead.
    """
    import triton
    from triton import knobs

    function = _find_c_function(compiled, grid, constants, triton.__version__)
    if function is None:
        return lambda _, arguments: through_triton(*arguments, *constants)
    size = compiled.run.global_scratch_size * compiled.run.num_ctas * math.prod(grid)
    stream_of, runtime = cast(Any, triton.runtime.driver.active).get_current_stream, knobs.runtime

    def start(scratch: Callable[[int], torch.Tensor], arguments: list) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            through_triton(*arguments, *constants)
            return
        function(stream_of(device), scratch(size) if size else None, arguments)

    return start


def _find_c_function(
    compiled: Any, grid: tuple[int, int, int], constants: list, release: str
) -> Callable[..., None] | None:
    """Return a function `(stream, memory, arguments)` that calls Triton's C function; None for an unknown `release`."""
    from triton.backends.nvidia import driver

    launcher = compiled.run
    if type(launcher) is not driver.CudaLauncher or launcher.profile_scratch_size:
        return None
    launch, metadata = launcher.launch, compiled.packed_metadata
    flags = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    if getattr(driver, "_BASE_ARGS_FORMAT", None) == FORMAT_3_6:
        behind = None, metadata, None, None, None
        return lambda stream, memory, arguments: launch(*grid, stream, *flags, memory, *behind, *arguments, *constants)
    if not release.startswith(LATER_RELEASES) or getattr(launcher, "gsan_enabled", False):
        return None
    kinds = launcher.arg_annotations, launcher.kernel_signature
    return lambda stream, memory, arguments: launch(
        *grid, stream, *flags, metadata, None, None, None, memory, None, *kinds, (*arguments, *constants)
    )
