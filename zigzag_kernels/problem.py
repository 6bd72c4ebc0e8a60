"""`Problem`: the attention of one rank in plain values, made by `make_problem`, which checks arrays and options.

The host knows every value here before a launch. The rank and `cu_seqlens` are device data, so they are not part of it.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from .callspec import CallSpec
from .checks import (
    DTYPE_BYTES,
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    MAX_ROWS,
    MIN_HEAD_DIM,
    check_strides,
    check_world_size,
)
from .halo import KEY_SLOTS
from .modes import KVLayout, Layout
from .segments.columns import SEGMENT_FIELDS, SEQUENCE_FIELDS


class ArraySpec(NamedTuple):
    """An array as the kernels see it; strides are in elements, and the last dimension is contiguous."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, int]  # (token, head)


@dataclass(frozen=True)
class Problem:
    """The attention of one rank's queries over a K/V buffer, with all KV heads or a window of them.

    `q` is `[tokens, heads, head_dim]`, k and v are `[slots * slot_rows, window, head_dim]`, where `window` counts the
    heads that the buffer holds of the `kv_heads` KV heads. `sequences` is N in `cu_seqlens [N + 1]`. Strides are
    (token, head) in elements; the last dimension is contiguous. `target` is the compute capability, such as "9.0", or
    "interpret". `gluon` says that the front end can launch Gluon kernels on these arrays, which then begin at multiples
    of 16 bytes. Unless `call.deterministic` is set, the backward pass may use a kernel whose results differ in their
    last bits from run to run.

    A problem may be one part of a batch of two parts. Its rows of `q`, and of all results, are then the rows from
    `first_row` to `end_row`; an `end_row` of None is the end of the arrays. If `end_row` is set, k and v have `tokens`
    rows like `q`, and the part's keys are in the same rows.
    """

    call: CallSpec
    tokens: int
    sequences: int
    world_size: int
    heads: int
    kv_heads: int
    window: int
    head_dim: int
    dtype: str
    q_strides: tuple[int, int]
    k_strides: tuple[int, int]
    v_strides: tuple[int, int]
    kv_layout: KVLayout
    slot_rows: int
    target: str
    gluon: bool
    first_row: int = 0
    end_row: int | None = None

    def __hash__(self):
        """Return a hash of the few fields that usually differ; eager calls look up their plan with this hash."""
        return hash((self.tokens, self.sequences, self.window, self.head_dim, self.q_strides, self.k_strides))

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows that the launches of this problem compute."""
        return (self.tokens if self.end_row is None else self.end_row) - self.first_row

    @property
    def slots(self) -> int:
        """Number of slots of the K/V buffer; with one slot, the keys of a sequence are in position order."""
        if self.kv_layout == KVLayout.HALO:
            return KEY_SLOTS
        return self.world_size if self.kv_layout == KVLayout.GATHERED else 1

    @property
    def row_layout(self) -> bool:
        """True if packed rows are cut into chunks; a single rank does not cut rows."""
        return self.call.layout == Layout.ROW and self.world_size > 1

    @property
    def ranged(self) -> bool:
        """True if the mask is ranged: both ends of each row's keys, and the padding, come from the tables."""
        return self.call.has_range or self.call.has_lengths or self.row_layout or self.call.halo > 0

    @property
    def table_entries(self) -> tuple[int, int]:
        """Entries of the segment table and of the sequence table that the kernels of this problem read."""
        (segments, _), (sequences, _) = segment_table_shapes(self.sequences, 1, self.row_layout)
        return segments, segments if self.kv_layout == KVLayout.HALO else sequences

    @property
    def most_query_rows(self) -> int:
        """Upper bound of the query rows of one head that the tables of this problem name."""
        return min(self.rows, 2 * self.slot_rows) if self.kv_layout == KVLayout.HALO else self.rows

    @property
    def kv_tokens(self) -> int:
        """Rows of the K/V buffer that the launches of this problem read."""
        return self.slots * self.slot_rows

    @property
    def kv_array_rows(self) -> int:
        """Rows of the arrays k and v, and of their gradients."""
        return self.kv_tokens if self.end_row is None else self.tokens


def segment_table_shapes(
    sequences: int, steps: int = 1, row_layout: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the segment table and of the sequence table.

    The segment table has two entries for each sequence, and one for the padding. In the row layout the padding of the
    last row counts as one more sequence. With several ring `steps` there is one table for each step.
    `halo_table_shapes` returns the shapes of tables with halos.
    """
    lead = () if steps == 1 else (steps,)
    sequences += int(row_layout)  # PyTorch 2.11 cannot add a bool to a symbolic size
    return (*lead, 2 * sequences + 1, SEGMENT_FIELDS), (*lead, sequences + 1, SEQUENCE_FIELDS)


def halo_table_shapes(sequences: int, row_layout: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the segment tables and of the sequence tables with halos.

    The segment tables are: 0 for rows that need only the rank's own keys, 1 for rows that need a halo, 2 for the rows
    that are sent. There are sequence tables 0 and 1. Sequence table 0 needs only about half of its entries, and fills
    the end of its memory.
    """
    (segments, _), _ = segment_table_shapes(sequences, 1, row_layout)
    return (3, segments, SEGMENT_FIELDS), (2, segments, SEQUENCE_FIELDS)


def table_shapes(
    kv_layout: KVLayout, sequences: int, world_size: int, row_layout: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the tables of a batch with K/V in this layout: see `segment_table_shapes`."""
    if kv_layout is KVLayout.HALO and world_size > 1:
        return halo_table_shapes(sequences, row_layout)
    return segment_table_shapes(sequences, world_size if kv_layout is KVLayout.PEER else 1, row_layout)


def count_sequences(call: CallSpec, entries: int, world_size: int) -> int:
    """Return the number of sequences of a call whose sequence tables have `entries` entries in all.

    In a batch of two parts, `entries` counts the tables of both parts, and the result counts only the split documents.
    """
    further = 1 + int(call.layout == Layout.ROW and world_size > 1)  # entries for padding, besides the documents
    if call.whole_tokens:
        _, shape = table_shapes(call.method.kv_layout, 0, world_size)
        entries = (entries - call.whole_documents - 1) // math.prod(shape[:-2]) or further
    if call.halo:  # sequence tables with halos have an entry for each chunk of a sequence
        entries = entries // 2 + 1
    return max(entries - further, 0)


def make_problem(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    call: CallSpec,
    *,
    sequences: int,
    world_size: int,
    target: str,
    kv_layout: KVLayout = KVLayout.GATHERED,
    kv_heads: int | None = None,
    gluon: bool = False,
    kv_rows: int | None = None,
) -> Problem:
    """Check that the arrays and options fit each other, and return them as a `Problem`.

    `kv_heads` is the number of all KV heads, if k and v are a window of them; None means the heads of k. `kv_rows` is
    the number of rows of k; None means the rows of all ranks, or of one rank in the layout "peer". Raises `ValueError`
    for shapes, dtypes, strides and options that do not fit each other.
    """
    arrays = {"q": q, "k": k, "v": v}
    for name, (shape, dtype, _) in arrays.items():
        if len(shape) != 3:
            raise ValueError(f"{name}: expected 3 dimensions [tokens, heads, head_dim], got shape {shape}")
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name}: expected dtype {', '.join(DTYPE_BYTES)}, got {dtype}")
        if dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {dtype}")
    check_world_size(world_size)
    (tokens, heads, head_dim), (kv_tokens, window, _) = q.shape, k.shape
    kv_heads = window if kv_heads is None else kv_heads
    ranks = 1 if kv_layout == KVLayout.PEER else world_size
    kv_rows = ranks * tokens if kv_rows is None else kv_rows
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {k.shape}, got {v.shape}")
    if kv_tokens != kv_rows:
        rows = f"the {tokens} rows of q" if ranks == 1 else f"world_size * tokens = {ranks} * {tokens} = {kv_rows} rows"
        raise ValueError(f"k: expected {rows}, got {kv_tokens}")
    if k.shape[2] != head_dim:
        raise ValueError(f"k: expected the head_dim of q, {head_dim}, got {k.shape[2]}")
    if not (MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0):
        raise ValueError(
            f"head_dim: expected a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
        )
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"q: expected a number of heads divisible by the {kv_heads} heads of k and v, got {heads}")
    if max(kv_tokens, tokens * heads // kv_heads) > MAX_ROWS:
        raise ValueError(f"q: expected at most {MAX_ROWS} rows of keys and of queries, got {kv_tokens} and {tokens}")
    for name, (_, _, strides) in arrays.items():
        check_strides(name, strides, heads // kv_heads if name == "q" else 1)
    if call.grad_reduce_dtype not in ("float32", q.dtype):
        raise ValueError(
            f"grad_reduce_dtype: expected None, float32 or the dtype of q, {q.dtype}, got {call.grad_reduce_dtype}"
        )
    return Problem(
        call=call,
        tokens=tokens,
        sequences=sequences,
        world_size=world_size,
        heads=heads,
        kv_heads=kv_heads,
        window=window,
        head_dim=head_dim,
        dtype=q.dtype,
        q_strides=q.strides,
        k_strides=k.strides,
        v_strides=v.strides,
        kv_layout=kv_layout,
        slot_rows=kv_tokens if kv_layout == KVLayout.CONTIGUOUS else tokens,
        target=target,
        gluon=gluon,
    )


def parts_of(problem: Problem) -> tuple[Problem, Problem]:
    """Return (problem of the whole documents, problem of the split documents) of a batch of two parts.

    `problem` has all rows of a rank. Raises `ValueError` if it has fewer rows than the whole documents need.
    """
    call, rows = problem.call, problem.call.whole_tokens
    if rows > problem.tokens:
        raise ValueError(f"q: expected at least the {rows} rows of whole documents, got {problem.tokens}")
    whole = replace(
        problem,
        call=replace(call, has_lengths=False, halo=0, halo_rows=0),
        sequences=call.whole_documents,
        world_size=1,
        kv_layout=KVLayout.GATHERED,
        slot_rows=rows,
        end_row=rows,
    )
    return whole, replace(problem, first_row=rows, slot_rows=problem.tokens - rows)
