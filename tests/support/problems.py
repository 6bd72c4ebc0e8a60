"""Problems to plan launches for, and the launches of a forward and a backward pass; arrays and a GPU are not needed."""

from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.problem import ArraySpec, make_problem


def small_problem(head_dim=64, dtype="bfloat16", target="9.0", tokens=512, world_size=2, gluon=False):
    """Three sequences, eight heads, two KV heads."""
    q = ArraySpec((tokens, 8, head_dim), dtype, (8 * head_dim, head_dim))
    kv = ArraySpec((world_size * tokens, 2, head_dim), dtype, (2 * head_dim, head_dim))
    return make_problem(
        q, kv, kv, make_call_spec(head_dim=head_dim, backend="triton"), sequences=3, world_size=world_size,
        target=target, gluon=gluon,
    )  # fmt: skip


def hopper_problem(
    tokens=8192, head_dim=128, dtype="bfloat16", stride=None, q_stride=None, target="9.0", gluon=True, sequences=1,
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
    """Segment tables, forward, delta, dK/dV, dQ."""
    return [
        plan._segments_launch(problem.sequences, problem.world_size, problem.kv_layout, problem.target),
        plan._forward_launch(problem, part),
        plan._delta_launch(problem, problem.q_strides, True, part),
        *plan._dkdv_launches(problem, problem.q_strides, part),
        plan._dq_launch(problem, problem.q_strides, part),
    ]
