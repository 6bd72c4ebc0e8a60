"""A kernel that was launched before is launched again without Triton's look at every argument, and yet alike.

Needs no GPU: Triton compiles for one, and a stand-in for its driver writes down what it is to launch.
"""

import subprocess
import sys

SCRIPT = """
import itertools, sys, types
from unittest import mock
sys.path.insert(0, {tests!r})
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from test_plan import problem
from zigzag_kernels import plan
from zigzag_torch import launch as torch_launch

recorded, handles = [], itertools.count(1)


class Driver:
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: dict(max_shared_mem=232448),
        load_binary=lambda *_: ("module", next(handles), 32, 0, 1024),
        unload_module=lambda module: None,
    )
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

    def launcher_cls(self, *_):
        return lambda *arguments: recorded.append(arguments)


def launched(call, *arrays):
    # everything that the launcher gets; of new arrays it says what they are
    recorded.clear()
    call(*arrays)
    (arguments,) = recorded
    data = [x.data if hasattr(x, "extras") else x for x in arguments]  # of metadata, which is made for every launch
    return [(x.dtype, x.shape, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x for x in data]


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


triton.runtime.driver.set_active(Driver())
made = problem(16, "float32")
tables = plan._segments_launch(3, 4, "gathered", "9.0")
delta = plan._delta_launch(made, made.q_strides, True, plan.WHOLE)
lengths, rank = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
rows, statistics = torch.zeros(made.tokens, made.heads, made.head_dim), torch.zeros(made.heads, made.tokens)
kernels = set()
for launch, arrays in (
    (tables, (lengths, rank)),
    (delta, (rows, rows, statistics, statistics)),
    (delta, (rows, misaligned(rows), statistics, statistics)),
    (delta, (rows, rows.half(), statistics, statistics)),
):

    def tritons(*arrays):
        outputs = [torch_launch.allocate(output, arrays[0].device) for output in launch.outputs]
        options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
        launch.kernel[launch.grid](*arrays, *launch.scalars.values(), *outputs, **launch.constexprs, **options)

    def ours(*arrays):
        torch_launch.run(launch, *arrays)

    for debug, hook in ((False, None), (False, print), (True, None)):
        knobs.runtime.debug, knobs.runtime.launch_enter_hook = debug, hook
        expected = launched(tritons, *arrays)
        kernels.add(expected[4])
        launched(ours, *arrays)
        with mock.patch.object(triton.JITFunction, "run", side_effect=AssertionError("launched by Triton's own call")):
            for again in (arrays, tuple(x.clone() if x.data_ptr() % 16 == 0 else x for x in arrays)):
                assert launched(ours, *again) == expected, launch
assert kernels == set(range(1, 9)), kernels  # one for each of four kinds of arrays, with and without debugging
"""


def test_a_kernel_is_launched_again_as_triton_would(request, tmp_path, monkeypatch):
    """The same kernel for arrays of the same types and alignment, another one for others, with the same arguments."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in a process of its own, for this one may interpret
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = SCRIPT.format(tests=str(request.path.parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
