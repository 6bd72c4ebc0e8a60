"""A kernel that was launched before is launched again without Triton's look at every argument, and yet alike.

Needs no GPU: Triton compiles for one, and a stand-in for its launcher, or for the function in C that this calls, writes
down what it is to launch.
"""

import subprocess
import sys

import pytest
import triton

from zigzag_torch.launch import LATER

SCRIPT = """
import itertools, sys, types
from concurrent.futures import ThreadPoolExecutor
from unittest import mock
sys.path.insert(0, {root!r})
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.runtime import _allocation
from tests.kernels.test_plan import problem
from zigzag_kernels import hopper, plan
from zigzag_torch import launch as torch_launch

recorded, handles = [], itertools.count(1)


def record(*arguments):
    recorded.append(arguments)


class Driver:
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: dict(max_shared_mem=232448),
        load_binary=lambda *_: ("module", next(handles), 32, 0, 1024),
        unload_module=lambda module: None,
        launch=record,
    )
    launcher_cls = driver.CudaLauncher if {in_c} else lambda *_: record
    get_current_device = lambda _: 0
    get_current_stream = lambda *_: 7
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)


def plain(x):
    # what becomes of an argument in the end; hooks that call nobody are none
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


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def refused(*_):
    raise AssertionError("the user's allocator was asked")


def scratch(size):
    sizes.append(size)
    return memory


if {in_c}:  # until 3.6 a function for each kernel, then one for all that is told of each kernel's arguments
    driver.library_dirs = lambda: []
    driver.compile_module_from_src = lambda **_: types.SimpleNamespace(launch=record)
    driver.annotate_arguments = driver.make_kernel_signature = list
triton.runtime.driver.set_active(Driver())
triton.set_allocator(refused)
made, sizes, memory = problem(16, "float32"), [], torch.zeros(128)
tables = plan._segments_launch(3, 4, "gathered", "9.0")
delta = plan._delta_launch(made, made.q_strides, True, plan.WHOLE)
lengths, rank = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
rows, statistics = torch.zeros(made.tokens, made.heads, made.head_dim), torch.zeros(made.heads, made.tokens)
cases = [
    (tables, (lengths, rank)),
    (delta, (rows, rows.clone(), statistics, statistics.clone())),
    (delta, (rows, misaligned(rows), statistics, statistics)),
    (delta, (rows, rows.half(), statistics, statistics)),
]
gluon = triton.__version__.startswith(hopper.TRITON)
if gluon:
    made = problem(128, gluon=True)
    q, kv = torch.zeros(512, 8, 128, dtype=torch.bfloat16), torch.zeros(1024, 2, 128, dtype=torch.bfloat16)
    into = torch.zeros_like(q), torch.zeros(8, 512)
    table = torch.zeros(7, 8, dtype=torch.int32)
    forward = plan._forward_launch(made, plan.WHOLE)
    cases += [(forward, (q, kv, kv.clone(), table, *into)), (forward, (q, kv, kv.clone(), table, None, None))]
kernels, hooks = set(), (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
for launch, arrays in cases:
    outputs = {{x.name: torch_launch.allocate(x, rows) for x in launch.outputs}}

    def tritons(*arrays):
        given = dict(zip(launch.inputs, arrays, strict=True))
        for name, place in launch.in_place.items():
            given[place] = outputs[name] if given[place] is None else given[place]
        written = [given.get(launch.in_place.get(name), x) for name, x in outputs.items()]
        options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
        torch_launch.with_scratch(
            launch.kernel[launch.grid], *given.values(), *launch.scalars.values(), *written, **launch.constexprs,
            **options,
        )

    def ours(*arrays):
        torch_launch.run(launch, *arrays)

    with (
        mock.patch.object(torch_launch, "allocate", lambda output, like: outputs[output.name]),
        mock.patch.object(torch_launch, "scratch", scratch),
    ):
        for debug, listened in ((False, ()), (False, hooks[:1]), (False, hooks[1:]), (True, ())):
            knobs.runtime.debug = debug
            for hook in hooks:
                (hook.add if hook in listened else hook.remove)(print)
            expected = launched(tritons, *arrays)
            assert bool(expected[1]) == bool(launch.scratch and {in_c})
            assert str(expected).count(str(print)) == len(listened)
            kernels.add(expected[0][4])
            launched(ours, *arrays)
            again = tuple(x if x is None or x.data_ptr() % 16 else x.clone() for x in arrays)
            with (
                mock.patch.object(triton.JITFunction, "run", side_effect=AssertionError("launched by Triton's call")),
                ThreadPoolExecutor() as thread,
            ):
                assert launched(ours, *arrays) == expected, launch
                other = launched(ours, *again)
                assert thread.submit(launched, ours, *again).result() == other
            assert other == launched(tritons, *again), launch
assert len(kernels) == 2 * (4 + gluon), kernels  # one for each kind of arrays, with and without debugging
assert _allocation._allocator.get() is refused
"""


@pytest.mark.parametrize("in_c", [True, False])
def test_a_compiled_kernel_is_launched_again_as_triton_would(request, tmp_path_factory, monkeypatch, in_c):
    """The same kernel for arrays of the same types and alignment, another one for others, with the same arguments."""
    if in_c and not triton.__version__.startswith(("3.6.", *LATER)):
        pytest.skip("what this release of Triton has in C is not known")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in a process of its own, for this one may interpret
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "launched"))  # both have these kernels
    code = SCRIPT.format(root=str(request.path.parents[2]), in_c=in_c)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
