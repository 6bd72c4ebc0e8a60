"""Launches kernels from PyTorch for the first time and again, and checks that Triton is handed the same each time.

    python -m tests.programs.relaunch [--in-c] [--slowly]

Needs no GPU: Triton compiles for one, and a stand-in for its launcher, or with --in-c for the function in C that the
launcher calls, writes down what it is to launch. With --slowly the fast path is switched off.
"""

import argparse
import contextlib
import functools
import itertools
import types
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.runtime import _allocation

from tests.support.problems import launches, launches_of, small_problem
from zigzag_kernels.hopper import rules
from zigzag_kernels.launch import run_by_name
from zigzag_kernels.modes import Operation
from zigzag_kernels.plan.steps import make_backward
from zigzag_kernels.segments.columns import SEGMENT_FIELDS
from zigzag_torch import launch as torch_launch

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--in-c", action="store_true")
parser.add_argument("--slowly", action="store_true")
IN_C = parser.parse_args().in_c
if SLOWLY := parser.parse_args().slowly:
    torch_launch.fast_launch = None
recorded, handles = [], itertools.count(1)


def record(*arguments):
    recorded.append(arguments)


class Driver:
    """Stands for Triton's driver: GPUs of compute capability 9.0, each with one stream for everything."""

    current = 0
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *_: ("module", next(handles), 32, 0, 1024),
        unload_module=lambda module: None,
        launch=record,
    )
    launcher_cls = driver.CudaLauncher if IN_C else lambda *_: record

    @staticmethod
    def get_current_device():
        return Driver.current

    @staticmethod
    def get_current_stream(gpu):
        return 7 + max(gpu, 0)  # -1 is the device of a tensor on the CPU

    @staticmethod
    def get_current_target():
        return GPUTarget("cuda", 90, 32)


def plain(x):
    """What becomes of an argument in the end; hooks that call nobody are none."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    if isinstance(x, knobs.HookChain):
        return tuple(x.calls) or None
    if hasattr(x, "extras"):  # what hooks are told, made for every launch
        return str(x.data) if listened else None
    return tuple(map(plain, x)) if isinstance(x, list | tuple) else x


def launched(call, *arrays):
    recorded.clear()
    sizes.clear()
    call(*arrays)
    (arguments,) = recorded
    return plain(arguments), tuple(sizes)


@contextlib.contextmanager
def on_gpu(number):
    """In it tensors are on this GPU, which is the current one."""
    guard = (torch.cuda, "device") if SLOWLY else (torch_launch.fast_launch, "DeviceGuard")
    with (
        mock.patch.object(Driver, "current", number),
        mock.patch.object(torch.Tensor, "get_device", return_value=number),
        mock.patch.object(*guard, return_value=contextlib.nullcontext()),
    ):
        yield


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def refused(*_):
    raise AssertionError("the user's allocator was asked, or one launch after another")


def scratch(size):
    sizes.append(size)
    return memory


def portable_cases():
    """(launch, arrays): other kinds of arrays for one kernel, aligned or not."""
    made = small_problem(16, "float32")
    tables, _, delta, *_ = launches(made)
    lengths, rank = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows, statistics = torch.zeros(made.tokens, made.heads, made.head_dim), torch.zeros(made.heads, made.tokens)
    return [
        (tables, (lengths, rank, lengths)),
        (delta, (rows, rows.clone(), statistics, statistics.clone())),
        (delta, (rows, misaligned(rows), statistics, statistics)),
        (delta, (rows, rows.half(), statistics, statistics)),
    ]


def hopper_cases():
    """The same for a kernel that has memory for descriptors, whose outputs are given or not."""
    (forward,) = launches_of(small_problem(128, gluon=True), Operation.FORWARD)
    q, kv = torch.zeros(512, 8, 128, dtype=torch.bfloat16), torch.zeros(1024, 2, 128, dtype=torch.bfloat16)
    into = torch.zeros_like(q), torch.zeros(8, 512)
    table = torch.zeros(7, SEGMENT_FIELDS, dtype=torch.int32)
    return [(forward, (q, kv, kv.clone(), q, table, *into)), (forward, (q, kv, kv.clone(), q, table, None, None))]


def check_backward_pass(made):
    """A pass that was started before is started as one, with what its launches are started with one by one."""
    launches = make_backward(made, made.q_strides, False).launches
    q, kv = (torch.zeros(rows, heads, made.head_dim) for rows, heads in ((made.tokens, 8), (2 * made.tokens, 2)))
    q, kv = q.to(getattr(torch, made.dtype)), kv.to(getattr(torch, made.dtype))
    lse, table = torch.zeros(8, made.tokens), torch.zeros(7, SEGMENT_FIELDS, dtype=torch.int32)
    arrays = {"q": q, "k": kv, "v": kv.clone(), "out": q.clone(), "lse": lse, "dlse": lse, "dout": q.clone()}
    arrays |= {"segments": table, "sequences": table.clone()}
    outputs = {x.name: torch_launch.allocate(x, like) for launch in launches for x in launch.outputs}

    def pass_of(arrays, run):
        recorded.clear()
        sizes.clear()
        run(launches, arrays)
        assert len(recorded) == len(launches)
        return [plain(arguments) for arguments in recorded], tuple(sizes)

    with (
        mock.patch.object(torch_launch, "allocate", lambda output, like: outputs[output.name]),
        mock.patch.object(torch_launch, "scratch", scratch),
    ):
        for given in (arrays, arrays | {"dout": misaligned(q), "k": misaligned(kv)}):
            if made.gluon and given is not arrays:  # the plan is another one
                continue
            expected = pass_of(given, functools.partial(run_by_name, torch_launch.run))
            assert pass_of(given, torch_launch.run_together) == expected
            refused_run = mock.patch.object(torch_launch, "run", refused)
            with contextlib.nullcontext() if SLOWLY else refused_run:
                assert pass_of(given, torch_launch.run_together) == expected
                moved = {name: x if x.data_ptr() % 16 else x.clone() for name, x in given.items()}
                others = pass_of(moved, torch_launch.run_together)
            assert others == pass_of(moved, functools.partial(run_by_name, torch_launch.run)) != expected


if IN_C:  # until 3.6 a function for each kernel, then one for all that is told of each kernel's arguments
    driver.library_dirs = list
    driver.compile_module_from_src = lambda **_: types.SimpleNamespace(launch=record)
    driver.annotate_arguments = driver.make_kernel_signature = list
triton.runtime.driver.set_active(Driver())
triton.set_allocator(refused)
sizes, memory, listened = [], torch.zeros(128), ()
like = torch.zeros(1)
has_gluon = triton.__version__.startswith(rules.TRITON)
kernels, loaded, hooks = set(), set(), (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
for launch, arrays in portable_cases() + (hopper_cases() if has_gluon else []):
    outputs = {x.name: torch_launch.allocate(x, like) for x in launch.outputs}

    def tritons(*arrays, launch=launch, outputs=outputs):
        """The launch by Triton's own call."""
        given = dict(zip(launch.inputs, arrays, strict=True))
        for name, place in launch.in_place.items():
            given[place] = outputs[name] if given[place] is None else given[place]
        written = [given.get(launch.in_place.get(name), x) for name, x in outputs.items()]
        torch_launch.with_scratch(
            launch.kernel[launch.grid], *given.values(), *launch.scalars.values(), *written, **launch.constexprs,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip

    def ours(*arrays, launch=launch):
        torch_launch.run(launch, *arrays)

    with (
        mock.patch.object(torch_launch, "allocate", lambda output, like, outputs=outputs: outputs[output.name]),
        mock.patch.object(torch_launch, "scratch", scratch),
    ):
        for debug, listened in ((False, ()), (False, hooks[:1]), (False, hooks[1:]), (True, ())):
            knobs.runtime.debug = debug
            for hook in hooks:
                (hook.add if hook in listened else hook.remove)(print)
            expected = launched(tritons, *arrays)
            assert bool(expected[1]) == bool(launch.scratch and IN_C)
            assert str(expected).count(str(print)) == len(listened)
            kernels.add(expected[0][4])
            launched(ours, *arrays)
            again = tuple(x if x is None or x.data_ptr() % 16 else x.clone() for x in arrays)
            failing = mock.patch.object(
                triton.JITFunction, "run", side_effect=AssertionError("launched by Triton's call")
            )
            with contextlib.nullcontext() if SLOWLY else failing, ThreadPoolExecutor() as thread:
                assert launched(ours, *arrays) == expected, launch
                other = launched(ours, *again)
                assert thread.submit(launched, ours, *again).result() == other
            assert other == launched(tritons, *again), launch
        for gpu in (1, 2, 1, 2):
            with on_gpu(gpu):
                expected = launched(tritons, *arrays)
                assert [launched(ours, *arrays) for _ in range(2)] == [expected] * 2, (gpu, launch)
                loaded.add((gpu, expected[0][4]))
# The kernels for Hopper take long to compile: only the call without options has them, which is a slow test.
wide = [small_problem(128, gluon=True)] if has_gluon and not IN_C and not SLOWLY else []
for made in (small_problem(16, "float32"), *wide):
    check_backward_pass(made)
# One for each kind of arrays, with and without debugging.
assert len(kernels) == 2 * (4 + has_gluon), kernels
assert len({kernel for _, kernel in loaded}) == len(loaded) == 2 * (4 + has_gluon), loaded  # every GPU has its own
assert _allocation._allocator.get() is refused
