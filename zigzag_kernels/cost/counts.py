"""Counts of the work of a rank in one step: operations, bytes read and moved, and memory, for each method.

The module needs neither a GPU nor a framework, so a laptop can plan a cluster.
"""

import dataclasses
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from ..batch_checks import check_document_lengths, check_halo
from ..checks import (
    DTYPE_BYTES,
    check_attention_chunk,
    check_dtype,
    check_flag,
    check_int,
    check_lengths,
    check_method,
    check_rank,
    check_real_lengths,
    check_window_size,
    check_world_size,
)
from ..halo import check_reach, message_rows
from ..heuristics import choose_heads_k_stride
from ..layout import chunk_length, row_position
from ..modes import Method

FLOAT32_BYTES = DTYPE_BYTES["float32"]


def causal_scores(position: int, rows: int) -> int:
    """Return the number of scores of `rows` consecutive queries from `position` on, under a causal mask."""
    return rows * position + rows * (rows + 1) // 2


class Mask(NamedTuple):
    """The mask of an attention step; its fields mean the same as the arguments of `zigzag_attention`."""

    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0


def visible_scores(position: int, rows: int, length: int, mask: Mask) -> int:
    """Return the number of scores of `rows` consecutive queries from `position` on, in a document of `length` tokens.

    Queries from position `length` on are padding and see no key.
    """
    first, last = min(position, length), min(position + rows, length)
    return _scores_before(last, length, mask) - _scores_before(first, length, mask)


def _scores_before(rows: int, length: int, mask: Mask) -> int:
    """Return the number of scores of the first `rows` queries of a document of `length` tokens."""
    chunk = mask.attention_chunk
    if chunk and chunk < length:
        whole = rows // chunk
        inside = mask._replace(attention_chunk=0)
        rest = _scores_before(rows - whole * chunk, min(chunk, length - whole * chunk), inside)
        return whole * _scores_before(chunk, chunk, inside) + rest
    left, right = mask.window_size
    hidden = 0 if left < 0 else causal_scores(0, max(rows - left - 1, 0))  # scores with keys before the window
    if mask.causal:
        right = 0
    if right < 0:
        return rows * length - hidden
    edge = min(rows, max(length - right, 0))  # queries before this position do not see the last key
    return edge * right + causal_scores(0, edge) + (rows - edge) * length - hidden


def unmasked_scores(
    lengths: tuple[int, ...],
    rank: int,
    world_size: int,
    causal: bool = True,
    *,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    real_lengths: tuple[int, ...] | None = None,
) -> int:
    """Return the number of unmasked scores of one query head in the zigzag rows of `rank`.

    `lengths` are the tokens of each document over all ranks, `real_lengths` the tokens without padding; None means that
    there is no padding. Raises `ValueError` for lengths that cannot be distributed over the ranks, and for an invalid
    rank or mask.
    """
    _check_documents(lengths, real_lengths, world_size)
    check_rank(rank, world_size, False)
    mask = Mask(check_flag("causal", causal), check_window_size(window_size), check_attention_chunk(attention_chunk))
    scores = 0
    for length, real in zip(lengths, lengths if real_lengths is None else real_lengths, strict=True):
        rows = chunk_length(length, world_size)
        for offset in range(0, length // world_size, rows or 1):
            scores += visible_scores(row_position(offset, length, rank, world_size), rows, real, mask)
    return scores


def _check_documents(
    lengths: tuple[int, ...], real_lengths: tuple[int, ...] | None, world_size: int
) -> tuple[list[int], tuple[int, ...] | None]:
    """Return (offsets, real lengths) of documents; `ValueError` for lengths that no batch has."""
    offsets = [*accumulate(check_document_lengths("lengths", lengths), initial=0)]
    check_lengths(offsets, world_size)
    if real_lengths is None:
        return offsets, None
    real = check_document_lengths("real_lengths", real_lengths)
    if len(real) != len(lengths):
        raise ValueError(f"real_lengths: expected one for each of {len(lengths)} documents, got {len(real)}")
    check_real_lengths(real, offsets, "real_lengths")
    return offsets, real


def forward_flops(scores: int, heads: int, head_dim: int) -> int:
    """Return the floating-point operations of the forward pass: two products for each of `scores` in each head."""
    return 4 * head_dim * heads * scores


def backward_flops(scores: int, heads: int, head_dim: int) -> int:
    """Return the floating-point operations of the backward pass, for the five products that gradients need.

    The two backward kernels compute seven products, because neither keeps the scores for the other.
    """
    return 10 * head_dim * heads * scores


@dataclass(frozen=True, kw_only=True)
class Step:
    """One attention layer, forward and backward, over a packed batch that `world_size` zigzag ranks share.

    `lengths` are the tokens of each split document over all ranks; `real_lengths` are their tokens without padding, or
    None if there is no padding. `padding` is the number of local rows behind the last sequence. In a batch of two
    parts, rank `r` also has `whole_tokens` rows for whole documents, whose lengths are `whole[r]`;
    `DocumentPlan.step` makes such a step. Raises `ValueError` for values that no call accepts.
    """

    lengths: tuple[int, ...]
    world_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    method: str = Method.ALLGATHER
    heads_k_stride: int | None = None
    grad_reduce_dtype: str = "float32"
    padding: int = 0
    real_lengths: tuple[int, ...] | None = None
    whole: tuple[tuple[int, ...], ...] = ()
    whole_tokens: int = 0

    def __post_init__(self):
        check_world_size(self.world_size)
        check_method(self.method)
        check_window_size(self.window_size)
        check_attention_chunk(self.attention_chunk)
        check_flag("causal", self.causal)
        offsets, real = _check_documents(self.lengths, self.real_lengths, self.world_size)
        for name in ("dtype", "grad_reduce_dtype"):
            check_dtype(name, getattr(self, name))
        for name, least in (("kv_heads", 1), ("heads", 1), ("head_dim", 1), ("padding", 0), ("whole_tokens", 0)):
            check_int(name, getattr(self, name), least)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: expected a multiple of the {self.kv_heads} KV heads, got {self.heads}")
        if self.method != Method.ALLGATHER and self.heads_k_stride is not None:
            raise ValueError(f"heads_k_stride: expected None with method {self.method!r}, got {self.heads_k_stride}")
        if self.method == Method.HALO:
            check_halo(offsets, real, self.world_size, None, (self._reach, 0))
        ranks = self.world_size if self.whole_tokens else 0
        if not isinstance(self.whole, tuple | list) or len(self.whole) != ranks:
            raise ValueError(f"whole: expected the documents of each rank if there are rows for some, got {self.whole}")
        if any(sum(check_document_lengths("whole", lengths)) > self.whole_tokens for lengths in self.whole):
            raise ValueError(f"whole: expected documents of {self.whole_tokens} tokens for each rank, got {self.whole}")
        choose_heads_k_stride(self.heads_k_stride, self)

    @property
    def tokens(self) -> int:
        """Local rows T."""
        return self.rows + self.whole_tokens

    @property
    def rows(self) -> int:
        """Local rows of split documents and of the padding behind them."""
        return sum(self.lengths) // self.world_size + self.padding

    @property
    def split(self) -> "Step":
        """The step of the split documents alone."""
        return dataclasses.replace(self, whole=(), whole_tokens=0)

    def whole_of(self, rank: int) -> "Step | None":
        """Return the step of the whole documents of `rank`, which move no K/V; None if there are no such rows."""
        if not self.whole_tokens:
            return None
        own = self.whole[check_rank(rank, self.world_size, False)]
        alone = {"method": Method.ALLGATHER, "heads_k_stride": None, "padding": self.whole_tokens - sum(own)}
        return dataclasses.replace(self.split, lengths=own, real_lengths=None, world_size=1, **alone)

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def window(self) -> int:
        """KV heads that one all-gather brings; all KV heads for other methods, and on a single rank."""
        if self.method != Method.ALLGATHER or self.world_size == 1:
            return self.kv_heads
        return choose_heads_k_stride(self.heads_k_stride, self)

    @property
    def ring(self) -> bool:
        return self.method == Method.RING and self.world_size > 1

    @property
    def halo(self) -> int:
        """Rows of a halo with method "halo" on several ranks, otherwise 0."""
        return self._reach if self.method == Method.HALO and self.world_size > 1 else 0

    @property
    def _reach(self) -> int:
        left, right = check_window_size(self.window_size)
        if not self.causal and right != 0:
            raise ValueError("causal: expected True, or a window that ends with its row, with method 'halo', got False")
        return check_reach(left, self.attention_chunk, 0)

    @property
    def halo_rows(self) -> int:
        """Rows of K and V in a message to a neighbour."""
        return message_rows(self.halo, self.rows, self.sequences, 0)

    @property
    def parts(self) -> int:
        """Number of pieces of one pass; while one piece is computed, the K/V of the next piece move.

        The pieces are ring steps, or windows of heads. With halos they are two: the rows that need no halo, and the
        rows that need one.
        """
        if self.halo:
            return 2
        return self.world_size if self.ring else self.kv_heads // self.window

    def neighbours(self, rank: int) -> int:
        """Return how many ranks send a halo to `rank`."""
        return (rank > 0) + (rank < self.world_size - 1)

    def halo_scores(self, rank: int) -> int:
        """Return the number of scores of one query head in the rows of `rank` that need a halo."""
        mask = Mask(True, check_window_size(self.window_size), self.attention_chunk)
        chunks = [rank] * (rank > 0) + [2 * self.world_size - 1 - rank] * (rank < self.world_size - 1)
        scores = 0
        for length, real in zip(self.lengths, self.real_lengths or self.lengths, strict=True):
            rows = chunk_length(length, self.world_size)
            scores += sum(visible_scores(chunk * rows, min(rows, self.halo), real, mask) for chunk in chunks)
        return scores

    def scores(self, rank: int) -> int:
        """Return the number of unmasked scores of one query head in all rows of `rank`."""
        mask = {"window_size": self.window_size, "attention_chunk": self.attention_chunk}
        whole = self.whole_of(rank)
        split = unmasked_scores(
            self.lengths, rank, self.world_size, self.causal, real_lengths=self.real_lengths, **mask
        )
        return split if whole is None else split + whole.scores(0)

    def arrays(self) -> "Arrays":
        """Return the bytes of the arrays of all local rows."""
        size, sum_size = DTYPE_BYTES[self.dtype], DTYPE_BYTES[self.grad_reduce_dtype]
        q, kv = self.tokens * self.heads * self.head_dim, 2 * self.tokens * self.kv_heads * self.head_dim
        rows, slot = self.tokens * self.heads, 2 * self.halo_rows * self.kv_heads * self.head_dim
        sizes = q * size, kv * size, rows * FLOAT32_BYTES, q * FLOAT32_BYTES, kv * sum_size
        return Arrays(*sizes, slot * size, slot * sum_size)


@dataclass(frozen=True)
class Arrays:
    """Bytes of the arrays of one rank."""

    q: int  # also out, dout, dq
    kv: int  # K and V of the local tokens, all heads
    rows: int  # one float32 for each token and query head: lse, delta
    q_sum: int  # out or dq in float32
    kv_sum: int  # dK and dV in `grad_reduce_dtype`, in which ranks add them up
    slot: int = 0  # K and V of the rows of one message, with method "halo"
    slot_sum: int = 0  # dK and dV of the rows of one message, in `grad_reduce_dtype`


@dataclass(frozen=True)
class Pass:
    """The cost of one direction, forward or backward, for one rank; the costs of parts of a batch add up."""

    flops: int
    # Bytes of the arrays of each launch, read or written once, and bytes received: the least that any cache achieves.
    hbm_bytes: int
    moved_bytes: int  # bytes received from other ranks; as many are sent
    launches: int  # launches of attention kernels; the tables of a batch are built once for all layers
    transfers: int  # collectives, or hops of the ring; K and V, or dK and dV, move in one transfer

    def __add__(self, other: "Pass") -> "Pass":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Pass(*(a + b for a, b in pairs))


NOTHING = Pass(0, 0, 0, 0, 0)


def forward(step: Step, rank: int = 0) -> Pass:
    """Return the cost of the forward pass of `rank`."""
    whole = step.whole_of(rank)
    if whole is not None:
        return forward(whole) + (forward(step.split, rank) if step.rows else NOTHING)
    x, ranks = step.arrays(), step.world_size
    moved = (ranks - 1) * x.kv
    if step.ring:
        # All ring steps but the first read the float32 results that they add to. The last sum is cast to the result.
        hbm = ranks * (x.q + x.kv) + (2 * ranks - 1) * (x.q_sum + x.rows) + (x.q_sum + x.q)
        transfers = ranks - 1
    elif step.halo:
        # Four slots are read and written by the copy, and the attention of rows that need a halo reads four.
        hbm, moved, transfers = 2 * x.q + x.kv + x.rows + 12 * x.slot, step.neighbours(rank) * x.slot, 1
    else:
        hbm = x.q + ranks * x.kv + (x.q + x.rows)
        transfers = step.parts if ranks > 1 else 0
    scores = step.scores(rank)
    return Pass(forward_flops(scores, step.heads, step.head_dim), hbm + moved, moved, step.parts, transfers)


def backward(step: Step, rank: int = 0) -> Pass:
    """Return the cost of the backward pass of `rank`.

    Each piece launches dK/dV and dQ. Delta is computed once with a ring or halos, and otherwise once for each window.
    """
    whole = step.whole_of(rank)
    if whole is not None:
        return backward(whole) + (backward(step.split, rank) if step.rows else NOTHING)
    x, ranks = step.arrays(), step.world_size
    delta, reads = 2 * x.q + 3 * x.rows, 2 * x.q + 2 * x.rows  # of delta; of each of the others, besides K/V
    if step.ring:
        sums = (2 * ranks - 1) * (x.q_sum + x.kv_sum) + (x.q_sum + x.q + x.kv_sum + x.kv)
        hbm = delta + 2 * ranks * (reads + x.kv) + sums
        moved = (ranks - 1) * x.kv + ranks * x.kv_sum  # dK/dV make one more hop, back to the rank that owns them
        transfers = 2 * ranks - 1
    elif step.halo:
        moved, transfers = step.neighbours(rank) * (x.slot + x.slot_sum), 2
        # dK/dV of own rows are written once, and read once by the final cast. The kernel for rows with a halo writes
        # four slots. Two additions, of two slots each, read the slots, and read and write the rows that they belong to.
        sums = 2 * x.kv_sum + x.kv + 4 * x.slot_sum + 2 * 6 * x.slot_sum
        hbm = delta + 2 * (reads + x.kv) + x.q + 16 * x.slot + sums
    else:
        moved = (ranks - 1) * (x.kv + x.kv_sum)
        hbm = delta + 2 * (reads + ranks * x.kv) + x.q
        hbm += ranks * x.kv_sum + x.kv_sum + x.kv if ranks > 1 else x.kv
        transfers = 2 * step.parts if ranks > 1 else 0
    scores = step.scores(rank)
    launches = 2 * step.parts + (1 if step.ring or step.halo else step.parts)
    return Pass(backward_flops(scores, step.heads, step.head_dim), hbm + moved, moved, launches, transfers)


def extra_memory(step: Step) -> dict[str, int]:
    """Return {use: bytes} of the extra memory at its peak, which is in the backward pass.

    Extra memory is all memory besides inputs, out, lse and gradients. Between ranks the numbers describe JAX. PyTorch
    differs in two ways: it sends and receives rows from within the buffers of all ranks, and holds delta and
    lse of two windows.
    """
    whole = step.whole_of(0)
    if whole is not None:
        (rows,) = extra_memory(whole).values()
        return {"delta, lse of whole documents": rows} | (extra_memory(step.split) if step.rows else {})
    x, ranks = step.arrays(), step.world_size
    memory = {"delta, lse in base 2": 2 * x.rows if step.ring or step.halo else 2 * x.rows // step.parts}
    if step.ring:
        memory |= {"two K/V buffers": 2 * x.kv, "float32 dQ": x.q_sum, "two dK/dV buffers": 2 * x.kv_sum}
    elif step.halo:
        memory |= {"six slots of K/V": 6 * x.slot, "dK/dV": x.kv_sum, "dK/dV of six slots": 6 * x.slot_sum}
    elif ranks > 1:
        buffers = min(2, step.parts)
        memory["K/V of all ranks"] = buffers * ranks * x.kv // step.parts
        memory["dK/dV for all ranks"] = ranks * x.kv_sum // step.parts
        memory["local K/V to send, dK/dV received"] = (buffers * x.kv + x.kv_sum) // step.parts
    return memory
