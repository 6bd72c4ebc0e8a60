"""What is asked of the kernels, in plain values: `Problem`, and the one place where it is checked.

Everything here is known on the host before a launch. The rank and `cu_seqlens` are device data and never appear.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from .backend import INTERPRET

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 8
MAX_ROWS = 2**30  # sums of two row numbers are int32 in the kernels
MAX_TILE_OFFSET = 2**31 - 1  # offsets inside a tile are int32; those of the tile itself are int64
MAX_BLOCK = 256
METHODS = ("allgather", "ring")
FILLING_ROWS = 2**16  # 512 tiles of 128 rows: several for each multiprocessor of any GPU so far
LASTING_SCORES = 2**30  # half a millisecond of an H200, and a host took 0.4 to send the next window off
SEGMENT_FIELDS = 8
SEQUENCE_FIELDS = 12
# Where the keys of a sequence are: rank-major in the buffer that an all-gather delivers; those of one rank alone, as
# they travel around a ring; or all in position order.
GATHERED, PEER, CONTIGUOUS = KV_LAYOUTS = ("gathered", "peer", "contiguous")


@dataclass(frozen=True)
class Problem:
    """One rank's attention over K/V in one of `KV_LAYOUTS`, or over a window of their heads.

    `q [tokens, heads, head_dim]`, `k, v [slots * slot_rows, window, head_dim]`: `window` of the `kv_heads` KV heads.
    `sequences` is N in `cu_seqlens [N + 1]`. Strides are (token, head) in elements; the last dimension is contiguous.
    `target` is the compute capability, say "9.0", or "interpret"; `gluon` says that the front end can launch Gluon
    kernels on these arrays, which then begin at multiples of 16 bytes. Unless `deterministic`, a backward pass may be
    taken that gives other bits each time.
    """

    tokens: int
    sequences: int
    world_size: int
    heads: int
    kv_heads: int
    window: int
    head_dim: int
    dtype: str
    causal: bool
    softmax_scale: float
    q_strides: tuple[int, int]
    k_strides: tuple[int, int]
    v_strides: tuple[int, int]
    kv_layout: str
    slot_rows: int
    target: str
    gluon: bool
    deterministic: bool

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def slots(self) -> int:
        """Parts of the K/V buffer in which a sequence's keys follow each other by chunk, not by position."""
        return self.world_size if self.kv_layout == GATHERED else 1

    @property
    def kv_tokens(self) -> int:
        return self.slots * self.slot_rows


def segment_table_shapes(sequences: int, steps: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the segment table (two chunks a sequence, and the padding) and of the sequence table; with several
    `steps`, of one table each."""
    lead = () if steps == 1 else (steps,)
    return (*lead, 2 * sequences + 1, SEGMENT_FIELDS), (*lead, sequences + 1, SEQUENCE_FIELDS)


def check_target(target: str) -> None:
    """`RuntimeError` for a GPU that the kernels do not run on."""
    if target != INTERPRET and float(target) < 8.0:
        raise RuntimeError(f"the kernels need a GPU of compute capability 8.0 or newer, got {target}")


def make_problem(
    q: tuple[tuple[int, ...], str, tuple[int, int]],
    k: tuple[tuple[int, ...], str, tuple[int, int]],
    v: tuple[tuple[int, ...], str, tuple[int, int]],
    *,
    sequences: int,
    world_size: int,
    causal: bool,
    softmax_scale: float | None,
    target: str,
    kv_layout: str = GATHERED,
    kv_heads: int | None = None,
    gluon: bool = False,
    kv_rows: int | None = None,
    deterministic: bool = True,
) -> Problem:
    """The `Problem` of arrays given as (shape, dtype name, (token, head) strides).

    `ValueError` for shapes, types and numbers that are not one attention problem. `softmax_scale` None is
    `1 / sqrt(head_dim)`; `kv_heads` None are those of k: more, if k and v are a window of them. `kv_rows` None are the
    rows of `world_size` ranks; tables that know of another number of rows may have it in the "contiguous" layout.
    """
    arrays = {"q": q, "k": k, "v": v}
    for name, (shape, dtype, _) in arrays.items():
        if len(shape) != 3:
            raise ValueError(f"{name}: expected 3 dimensions [tokens, heads, head_dim], got shape {shape}")
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name}: expected dtype {', '.join(DTYPE_BYTES)}, got {dtype}")
        if dtype != q[1]:
            raise ValueError(f"{name}: expected the dtype of q, {q[1]}, got {dtype}")
    check_world_size(world_size)
    (tokens, heads, head_dim), (kv_tokens, window, _) = q[0], k[0]
    kv_heads = window if kv_heads is None else kv_heads
    ranks = 1 if kv_layout == PEER else world_size
    kv_rows = ranks * tokens if kv_rows is None else kv_rows
    if v[0] != k[0]:
        raise ValueError(f"v: expected the shape of k, {k[0]}, got {v[0]}")
    if kv_tokens != kv_rows:
        raise ValueError(f"k: expected world_size * tokens = {ranks} * {tokens} = {kv_rows} rows, got {kv_tokens}")
    if k[0][2] != head_dim:
        raise ValueError(f"k: expected the head_dim of q, {head_dim}, got {k[0][2]}")
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
    for name, flag in {"causal": causal, "deterministic": deterministic}.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: expected True or False, got {flag!r}")
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(head_dim)
    check_softmax_scale(softmax_scale)
    return Problem(
        tokens=tokens,
        sequences=sequences,
        world_size=world_size,
        heads=heads,
        kv_heads=kv_heads,
        window=window,
        head_dim=head_dim,
        dtype=q[1],
        causal=causal,
        softmax_scale=float(softmax_scale),
        q_strides=q[2],
        k_strides=k[2],
        v_strides=v[2],
        kv_layout=kv_layout,
        slot_rows=kv_tokens if kv_layout == CONTIGUOUS else tokens,
        target=target,
        gluon=gluon,
        deterministic=deterministic,
    )


def batch_shape(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], has_cu_seqlens: bool
) -> tuple[int, int] | None:
    """(batch, T) of shapes `[batch, T, heads, head_dim]`, None for packed ones; `ValueError` if they are neither."""
    if len(q) == 3:
        return None
    if len(q) != 4:
        raise ValueError(f"q: expected [tokens, heads, head_dim] or [batch, T, heads, head_dim], got shape {q}")
    if has_cu_seqlens:
        raise ValueError("cu_seqlens: expected None with q [batch, T, heads, head_dim]")
    for name, shape in {"k": k, "v": v}.items():
        if len(shape) != 4 or shape[:2] != q[:2]:
            raise ValueError(f"{name}: expected [batch, T] = {list(q[:2])} as in q, got shape {shape}")
    return q[0], q[1]


def check_strides(name: str, strides: tuple[int, int], group: int) -> None:
    """`ValueError` for (token, head) strides so long that a tile's rows are too far apart for the kernels."""
    token, head = strides
    if min(strides) < 0 or (MAX_BLOCK - 1) * token + (group - 1) * head > MAX_TILE_OFFSET:
        raise ValueError(
            f"{name}: expected strides that keep a tile within 2**31 elements, got {strides}; copy it first"
        )


def check_world_size(world_size: int) -> None:
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size: expected a positive int, got {world_size!r}")


def check_rank(rank, world_size: int, is_array: bool) -> None:
    """`ValueError` unless `rank` is one of `world_size`, or an array (`is_array`) of one integer, unseen."""
    if is_array:
        shape, dtype = tuple(rank.shape), str(rank.dtype).removeprefix("torch.")
        if math.prod(shape) != 1 or "int" not in dtype:
            raise ValueError(f"rank: expected an int or an array of one integer, got shape {shape} {dtype}")
    elif isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank: expected an int or an array of one integer, got {type(rank).__name__}")
    elif not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")


def check_softmax_scale(softmax_scale: float) -> None:
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise ValueError(f"softmax_scale: expected a Python number, got {type(softmax_scale).__name__}")
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: expected a positive finite number, got {softmax_scale}")


def check_cu_seqlens(shape: tuple[int, ...], dtype: str) -> None:
    """`ValueError` unless `cu_seqlens` can be one: `[N + 1]` int32."""
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {shape}")
    if dtype != "int32":
        raise ValueError(f"cu_seqlens: expected dtype int32, got {dtype}")


def check_lengths(cu_seqlens: list[int], world_size: int, total: int | None = None) -> None:
    """`ValueError` unless the values can be dealt out to `world_size` ranks (host data: see `validate`).

    `total` is the number of rows of the packed batch; rows behind the last sequence are padding.
    """
    if cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens: expected to begin with 0, got {cu_seqlens[0]}")
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        if end < start:
            raise ValueError(f"cu_seqlens: expected no decrease, got {start} then {end} (sequence {i})")
        if world_size > 1 and (end - start) % (2 * world_size):
            raise ValueError(
                f"cu_seqlens: expected lengths that are multiples of 2 * world_size = {2 * world_size}, "
                f"got {end - start} (sequence {i}); pad_to_zigzag makes them so"
            )
    if total is not None and cu_seqlens[-1] > total:
        raise ValueError(f"cu_seqlens: expected to end at or before the {total} rows there are, got {cu_seqlens[-1]}")


def check_method(method: str) -> None:
    """`ValueError` unless `method` is a way of moving K/V between ranks."""
    if method not in METHODS:
        raise ValueError(f"method: expected {' or '.join(map(repr, METHODS))}, got {method!r}")


class Sizes(Protocol):
    """What the choice of a stride depends on: a `Problem`, or a `cost.Step`."""

    @property
    def tokens(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def sequences(self) -> int: ...


def choose_heads_k_stride(stride: int | None, sizes: Sizes) -> int:
    """KV heads that one all-gather brings: `stride`, or if None the fewest whose query rows still fill a GPU, and keep
    it busy while the next are sent for.

    Few heads at a time mean small buffers, and that only the first of several transfers is waited for. `ValueError`
    unless `stride` divides `kv_heads`.
    """
    kv_heads = sizes.kv_heads
    if stride is None:
        keys = sizes.world_size * sizes.tokens // max(sizes.sequences, 1)  # of the average sequence
        for divisor in (s for s in range(1, kv_heads) if kv_heads % s == 0):
            rows = sizes.tokens * sizes.heads // kv_heads * divisor
            if rows >= FILLING_ROWS and rows * keys >= LASTING_SCORES:
                return divisor
        return kv_heads
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or kv_heads % stride:
        raise ValueError(f"heads_k_stride: expected a divisor of the {kv_heads} KV heads, got {stride!r}")
    return stride
