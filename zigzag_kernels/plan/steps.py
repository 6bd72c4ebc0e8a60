"""The steps of attention that front ends call: each step looks up its launches and passes them to `run`.

`run(launch, *arrays) -> tuple of arrays` is the only place where a front end launches kernels. All front ends call the
functions here, so they launch the same kernels, with the same constants, in the same order. A `run` may have an
attribute `together`, a function that executes several launches at once; it has the arguments and results of
`launch.run_by_name`.

Between ranks, a front end computes attention in parts. A *window* has K/V of a few KV heads; its results are written
`into` arrays of all heads. A *ring step* has the keys of one rank; its results are merged into float32 arrays. In both
cases the front end calls `backward_rows`, `backward_keys` and `backward_queries` instead of `backward`, and
communicates between the calls. Where `fuses_windows` says so, it calls `backward_window` instead of the last two.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..launch import Launch, run_by_name
from ..modes import KVLayout, Layout, Operation
from ..problem import Problem
from . import planner
from .halo import make_addition, make_buffer, make_copy, make_sent
from .operation import WHOLE, Part, make_fused_window, make_operation
from .planner import NOTHING, Planned
from .rows import make_rows
from .sinks import make_sinks
from .tables import BatchForm, make_tables

Run = Callable[..., tuple]


def segment_tables(
    run: Run,
    cu_seqlens,
    rank,
    lengths=None,
    *,
    sequences: int,
    world_size: int,
    target: str,
    kv_layout: str = KVLayout.GATHERED,
    layout: str = Layout.DOCUMENT,
    row_length: int = 0,
    rows: int = 1,
    first_row: int = 0,
    end_row: int = 0,
    halo: int = 0,
    longest: int = 0,
) -> tuple:
    """Return (segments, sequences), the device tables of one batch on one rank, for all its layers.

    `lengths [N]` int32 are the real tokens of each document; None means that all tokens are real. In the row layout
    each of the `rows` packed rows has `row_length` tokens over all ranks. With `kv_layout` "peer" there is one table
    for each ring step: step `s` has the keys of rank `(rank - s) % world_size`. A part of a batch has the local rows
    from `first_row` to before `end_row`, where 0 means the end of the arrays; documents that need more rows are
    invalid. With `kv_layout` "halo" the tables have the shapes of `problem.halo_table_shapes`, for halos of `halo` rows
    and documents of at most `longest` real tokens, where 0 means no limit.
    """
    form = BatchForm(
        sequences, world_size, kv_layout, layout, row_length, rows, lengths is not None, first_row, end_row, halo,
        longest,
    )  # fmt: skip
    own, *of_halos = planner.current.plan(make_tables, form, target).launches
    inputs = cu_seqlens, rank, cu_seqlens if lengths is None else lengths
    tables = run(own, *inputs)
    for launch in of_halos:
        tables = run(launch, *inputs, *tables)
    return tables


def halo_rows(run: Run, problem: Problem, k, v, segments):
    """Return the buffer of halos `[6 * halo_rows, 2 * kv_heads, head_dim]`: K, then V, in the slots of `halo.HaloSlot`.

    `problem` describes the rank's own keys; `segments` are segment tables 1 and 2 of `segments.halo`. The caller
    receives the two halos from the neighbours. Elements that belong to no chunk are not written.
    """
    planned = planner.current.plan(make_copy, problem)
    (rows,) = run(planned.launches[0], k, v, segments)
    return rows


def sent_rows(run: Run, problem: Problem, k, v, segments) -> tuple:
    """Return the messages (early, late) `[halo_rows, 2 * kv_heads, head_dim]`, each with rows of K, then of V.

    `early` has the last rows of early chunks, for the next rank. `late` has the last rows of late chunks, for the
    previous rank. `problem` describes the rank's own keys; `segments` is segment table 2 of `segments.halo`. Elements
    that belong to no chunk are not written.
    """
    return run(planner.current.plan(make_sent, problem).launches[0], k, v, segments)


def halo_buffer(run: Run, problem: Problem, k, v, segments, halos: tuple) -> tuple:
    """Return the buffer of halos, (k, v) `[4 * halo_rows, kv_heads, head_dim]`, in the first slots of `halo.HaloSlot`.

    It has the first rows of each chunk, and the `halos` (early, late) that `sent_rows` returned on neighbours.
    `problem` describes the rank's own keys; `segments` is segment table 1 of `segments.halo`. Elements that belong to
    no chunk are not written.
    """
    return run(planner.current.plan(make_buffer, problem).launches[0], k, v, segments, *halos)


def add_halo_rows(
    run: Run,
    problem: Problem,
    early: tuple,
    late: tuple,
    segments,
    into: tuple,
    *,
    slots: tuple[int, int] | None = None,
) -> tuple:
    """Add gradients of rows of early and late chunks to `into`, (dk, dv) of all rows; return `into`.

    `early` and `late` are arrays (dk, dv) of slots of `halo_rows` rows. `slots` says which slot has the gradients, of
    early and of late chunks. Without `slots` they are messages `[halo_rows, 2 * kv_heads, head_dim]`, dk and dv in the
    same array. `segments` is the segment table that names the rows: 1 for the first rows of chunks, 2 for the rows that
    were sent.
    """
    planned = planner.current.plan(make_addition, problem, slots or (0, 0), slots is None)
    return run(planned.launches[0], *early, *late, segments, *into)


def forward(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    segments,
    *,
    sinks=None,
    part: Part = WHOLE,
    into: tuple = (None, None),
) -> tuple:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32, natural log).

    The results are new arrays, or the arrays `into`, whose elements outside of `part` do not change. `sinks [heads]`
    are float32, and required if `problem.call.has_sinks`. If the keys of a row come in several parts, only the first
    part counts the sinks. With `problem.call.return_max_logits` the second array is `[2, heads, T]`: lse, then the
    largest score of each row.
    """
    planned = planner.current.plan(make_operation, problem, Operation.FORWARD, part)
    return run(planned.launches[0], q, k, v, q if sinks is None else sinks, segments, *into)


def backward_rows(
    run: Run, problem: Problem, out, lse, dout, dlse, *, dout_strides: tuple[int, int], part: Part = WHOLE
) -> tuple:
    """Return (delta, lse2) of the query rows, `[window, T * group]` float32, which the other backward steps read.

    `dlse` may be None.
    """
    planned = planner.current.plan(make_rows, problem, dout_strides, dlse is not None, part)
    return _run_rows(run, planned, out, lse, dout, dlse)


def backward_keys(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    dout,
    rows: tuple,
    sequences,
    *,
    dout_strides: tuple[int, int],
    part: Part = WHOLE,
    into: tuple = (None, None),
) -> tuple:
    """Return (dk, dv) in the layout of k and v.

    `rows` are the results of `backward_rows` for the same part; other arguments are as in `forward`.
    """
    planned = planner.current.plan(make_operation, problem, Operation.DKDV, part, dout_strides)
    return _run_dkdv(run, planned, (q, k, v, dout, *rows, sequences), into)


def backward_queries(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    dout,
    rows: tuple,
    segments,
    *,
    dout_strides: tuple[int, int],
    part: Part = WHOLE,
    into=None,
):
    """Return dq `[T, heads, head_dim]`; arguments are as in `backward_keys`."""
    planned = planner.current.plan(make_operation, problem, Operation.DQ, part, dout_strides)
    (dq,) = run(planned.launches[0], q, k, v, dout, *rows, segments, into)
    return dq


def fuses_windows(problem: Problem, part: Part, *, dout_strides: tuple[int, int]) -> bool:
    """Return whether `backward_window` computes the gradients of windows, and not two other steps.

    `part` is a window whose results have the dtype of the sums over ranks.
    """
    return planner.current.plan(make_fused_window, problem, part, dout_strides) is not NOTHING


def backward_window(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    dout,
    rows: tuple,
    tables: tuple,
    *,
    dout_strides: tuple[int, int],
    part: Part,
    into: tuple = (None, None, None),
) -> tuple:
    """Return (dq, dk, dv) of a window if `fuses_windows`.

    `tables` is (segments, sequences). `part` says the dtype of dk and dv; dq has the dtype of q. Other arguments are as
    in `backward_keys`.
    """
    planned = planner.current.plan(make_fused_window, problem, part, dout_strides)
    names = "q", "k", "v", "dout", "delta", "lse2", "segments", "sequences", "dq", "dk", "dv"
    arrays: dict[str, object] = dict(zip(names, (q, k, v, dout, *rows, *tables, *into), strict=True))
    outputs = run_by_name(run, planned.launches, arrays)
    return outputs["dq"], outputs["dk"], outputs["dv"]


def backward_sinks(run: Run, problem: Problem, rows: tuple, sinks, *, part: Part = WHOLE, into=None):
    """Return dsinks `[heads]` float32 of this rank's rows, from the results of `backward_rows` for the same part."""
    first, second = planner.current.plan(make_sinks, problem, part).launches
    (parts,) = run(first, *rows, sinks)
    (dsinks,) = run(second, parts, into)
    return dsinks


def backward(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    out,
    lse,
    dout,
    *,
    dlse,
    segments,
    sequences,
    dout_strides: tuple[int, int],
    sinks=None,
) -> tuple:
    """Return (dq, dk, dv) of all heads at once, in the dtype of q, and dsinks if there are `sinks`.

    `dlse` may be None.
    """
    planned = planner.current.plan(make_backward, problem, dout_strides, dlse is not None)
    arrays = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, "dlse": lse if dlse is None else dlse,
        "segments": segments, "sequences": sequences, "sinks": sinks,
    }  # fmt: skip
    together = getattr(run, "together", None) or functools.partial(run_by_name, run)
    outputs = together(planned.launches, arrays)
    return outputs["dq"], outputs["dk"], outputs["dv"], *(() if sinks is None else (outputs["dsinks"],))


def _run_rows(run: Run, planned: Planned, out, lse, dout, dlse) -> tuple:
    return run(planned.launches[0], out, dout, lse, lse if dlse is None else dlse)


def _run_dkdv(run: Run, planned: Planned, inputs: tuple, into: tuple) -> tuple:
    for launch in planned.launches:
        into = run(launch, *inputs, *into)
    return into


@dataclass(frozen=True)
class BackwardPlan:
    """The launches of a whole backward pass: FUSED_BACKWARD, or the two operations DKDV and DQ."""

    rows: Planned
    fused: Planned
    dkdv: Planned
    dq: Planned
    sinks: Planned

    def __iter__(self) -> Iterator[Planned]:
        """Iterate over the operations that launch something."""
        operations = self.rows, self.fused, self.dkdv, self.dq, self.sinks
        return iter([planned for planned in operations if planned is not NOTHING])

    @functools.cached_property
    def launches(self) -> tuple[Launch, ...]:
        """All launches in order; `launch.run_by_name` passes arrays between them by name."""
        return tuple(launch for planned in self for launch in planned.launches)


def make_backward(problem: Problem, dout_strides: tuple[int, int], has_dlse: bool) -> BackwardPlan:
    """Return the plan of the whole backward pass, so that a call looks up a single plan."""
    rows = make_rows(problem, dout_strides, has_dlse, WHOLE)
    sinks = make_sinks(problem, WHOLE) if problem.call.has_sinks else NOTHING
    fused = make_operation(problem, Operation.FUSED_BACKWARD, WHOLE, dout_strides)
    if fused is not NOTHING:
        return BackwardPlan(rows, fused, NOTHING, NOTHING, sinks)
    dkdv = make_operation(problem, Operation.DKDV, WHOLE, dout_strides)
    return BackwardPlan(rows, NOTHING, dkdv, make_operation(problem, Operation.DQ, WHOLE, dout_strides), sinks)


def plan_step(
    problem: Problem, *, part: Part = WHOLE, dout_strides: tuple[int, int] | None = None, has_dlse: bool = True
) -> tuple[Planned, ...]:
    """Return the launches of the tables, the forward pass and the backward pass of `problem`, without the cache.

    `dout_strides` None means the strides of q.
    """
    strides = dout_strides or problem.q_strides
    row_length = problem.world_size * problem.tokens
    form = BatchForm(problem.sequences, problem.world_size, problem.kv_layout, problem.call.layout, row_length)
    halos = ()
    if problem.kv_layout == KVLayout.HALO:
        form = form._replace(halo=problem.call.halo)
        copies = make_copy(problem), make_sent(problem), make_buffer(problem)
        halos = *copies, make_addition(problem, (0, 1), False)
    tables = make_tables(form._replace(has_lengths=problem.call.has_lengths), problem.target)
    forward = make_operation(problem, Operation.FORWARD, part)
    if part == WHOLE:
        backward = (*make_backward(problem, strides, has_dlse),)
    else:
        fused = make_fused_window(problem, part, strides)
        pair = (make_operation(problem, operation, part, strides) for operation in (Operation.DKDV, Operation.DQ))
        gradients = pair if fused is NOTHING else (fused,)
        sinks = (make_sinks(problem, part),) if problem.call.has_sinks else ()
        backward = make_rows(problem, strides, has_dlse, part), *gradients, *sinks
    return tables, forward, *backward, *halos
