"""Problems to plan launches for, and the launches of a forward and a backward pass, without arrays or a GPU."""

from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.families import choose_family
from zigzag_kernels.modes import Operation
from zigzag_kernels.plan.operation import make_operation
from zigzag_kernels.problem import ArraySpec, make_problem
from zigzag_kernels.tiles.override import kernel_name


def small_problem(head_dim=64, dtype="bfloat16", target="9.0", tokens=512, world_size=2, gluon=False):
    """Three sequences, eight heads, two KV heads."""
    q = ArraySpec((tokens, 8, head_dim), dtype, (8 * head_dim, head_dim))
    kv = ArraySpec((world_size * tokens, 2, head_dim), dtype, (2 * head_dim, head_dim))
    return make_problem(
        q, kv, kv, make_call_spec(head_dim=head_dim, backend="triton"), sequences=3, world_size=world_size,
        target=target, gluon=gluon,
    )  # fmt: skip


def hopper_problem(
    tokens=8192, head_dim=128, dtype="bfloat16", *, stride=None, q_stride=None, target="9.0", gluon=True, sequences=1,
    world_size=8, deterministic=True,
):  # fmt: skip
    """One long sequence between eight ranks, 32 heads, eight KV heads: the kernels for Hopper can run it."""
    q = ArraySpec((tokens, 32, head_dim), dtype, (q_stride or 32 * head_dim, head_dim))
    kv = ArraySpec((world_size * tokens, 8, head_dim), dtype, (stride or 8 * head_dim, head_dim))
    return make_problem(
        q, kv, kv, make_call_spec(head_dim=head_dim, backend="triton", deterministic=deterministic),
        sequences=sequences, world_size=world_size, target=target, gluon=gluon,
    )  # fmt: skip


def launches(problem, part=plan.WHOLE):
    """All launches of a step: segment tables, forward, delta, dK/dV, dQ."""
    return [launch for planned in plan.plan_step(problem, part=part) for launch in planned.launches]


def launches_of(problem, operation, part=plan.WHOLE):
    """The launches of one operation, a `modes.Operation`, whether a step of `problem` has it or not."""
    strides = None if operation is Operation.FORWARD else problem.q_strides
    return make_operation(problem, operation, part, strides).launches


def serving(problem, operation, dout_strides=None):
    """The kernel that serves `operation`, by its name in override files, or None."""
    family = choose_family(problem, operation, dout_strides or problem.q_strides)
    return family and kernel_name(family.choose_kernel(problem, operation))
