"""Windows of KV heads whose gradients one kernel computes: on a Hopper GPU, or by a stand-in for that kernel."""

import contextlib
import os
from unittest import mock

from tests.support.hopper import RUNS
from tests.support.planners import RememberingPlanner
from zigzag_kernels import plan
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import Operation
from zigzag_kernels.plan import Part, Planned, steps
from zigzag_kernels.plan.operation import make_operation
from zigzag_kernels.plan.planner import NOTHING

STANDS_IN = not RUNS  # for the kernel
LEAST_HEAD_DIM = 16 if STANDS_IN else 64


def make_pair_in_one(problem, part, dout_strides):
    """Stands for `make_fused_window`: two kernels in one step, with the bits of two steps."""
    if problem.window == problem.kv_heads:
        return NOTHING
    dkdv = make_operation(problem, Operation.DKDV, part, dout_strides)
    dq = make_operation(problem, Operation.DQ, Part(part.first_kv_head), dout_strides)
    return Planned(dkdv.kernel, (*dkdv.launches, *dq.launches))


@contextlib.contextmanager
def in_one_kernel(stands_in: bool = STANDS_IN):
    """Let one kernel, or its stand-in, compute the gradients of each window, and see that a window was computed so."""
    forced = mock.patch.dict(os.environ, {rules.TURNS: "1", HOPPER.variable: "1"})
    replaced = mock.patch.object(steps, "make_fused_window", make_pair_in_one)
    with replaced if stands_in else forced, plan.use_planner(RememberingPlanner()) as planner:
        yield planner
    made = [{output.name for launch in planned.launches for output in launch.outputs} for planned in planner.planned]
    assert any({"dq", "dk", "dv"} <= names for names in made), "no window was computed by one kernel"
