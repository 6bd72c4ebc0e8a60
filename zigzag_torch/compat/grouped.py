"""The unfused path: it copies keys into position order, slices them, and computes attention for groups of chunks.

Benchmarks and checks use it as their baseline. The names, and what they do, come from the published zigzag llama3
functions. The host reads the lengths, and so waits for the device.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist

from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.checks import check_flag, check_int, check_lengths, check_rank, check_rows, check_world_size
from zigzag_kernels.problem import ArraySpec, make_problem

from ..arguments import cast_for_autocast, check_int32, check_tensor
from ..dispatch import first_derivatives_only, refuse_derivative
from ..launch import describe
from ..parallel import Residuals
from ..parallel.agreement import BACKWARD, agree
from ..parallel.allgather import windows
from ..parallel.collectives import reduce_into
from ..parallel.streams import streams_of
from ..profiling import region
from ..reference import Mask
from ..shard import position_order
from . import flash2
from .checks import KVSlice, check_grouped, check_list, check_n_chunks, check_slices, local_bounds, mask_of


def split_q_by_zigzag_chunk_index(
    q: torch.Tensor, cu_seqlens_q: torch.Tensor, world_size: int, rank: int, n_chunks: int = 2
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Sort the local rows of `rank` into `n_chunks` groups by the index of their chunk, early chunks first.

    `q` is `[T, heads, head_dim]`; `cu_seqlens_q [N + 1]` int32 are the offsets of sequences in the local rows. The
    `2 * world_size` chunks of a sequence are divided among the groups. With two groups, the early chunk of every
    sequence is in the first group, and the late chunk in the second.

    Returns:
        Three lists with one entry for each group: its rows `[rows, heads, head_dim]` (differentiable), the `cu_seqlens`
        of its chunks (`[N + 1]` with two groups), and the local numbers of its rows `[rows]` int64. Padding rows are in
        no group.
    """
    world_size = check_world_size(world_size)
    rank = check_rank(rank, world_size, False)
    check_tensor("q", q)
    check_rows("q", tuple(q.shape), 1)
    bounds = local_bounds("cu_seqlens_q", cu_seqlens_q, world_size, q.shape[0])
    q_list, cu_seqlens_list, indices_list = [], [], []
    for group in _groups((rank, 2 * world_size - 1 - rank), world_size, n_chunks):
        pieces = []
        for start, end in pairwise(bounds):
            middle = start + (end - start) // 2
            pieces += [((start, middle), (middle, end))[late] for late in group]
        indices = torch.cat([torch.arange(*piece, device="cpu") for piece in [(0, 0), *pieces]]).to(q.device)
        q_list.append(q.index_select(0, indices))
        cu_seqlens_list.append(offsets(pieces, cu_seqlens_q))
        indices_list.append(indices)
    return q_list, cu_seqlens_list, indices_list


def rearrange_kv_from_zigzag_to_contiguous(
    kv_buffer: torch.Tensor, world_size: int, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Return the gathered `kv_buffer [2, W * T, kv_heads, head_dim]` with every sequence in position order.

    In `kv_buffer` the rows of rank 0 come first, then the rows of rank 1, and so on; W is `world_size`.
    `cu_seqlens [N + 1]` int32 are offsets in the local rows, or in all rows if they end with `W * T`. Padding rows come
    last in the result. Differentiable.
    """
    world_size = check_world_size(world_size)
    check_tensor("kv_buffer", kv_buffer)
    if kv_buffer.ndim < 2 or kv_buffer.shape[0] != 2:
        raise ValueError(f"kv_buffer: expected [2, W * T, kv_heads, head_dim], got shape {tuple(kv_buffer.shape)}")
    check_rows("kv_buffer", tuple(kv_buffer.shape[1:]), world_size)
    check_int32("cu_seqlens", cu_seqlens)
    bounds = cu_seqlens.tolist()
    if bounds[-1] != kv_buffer.shape[1]:
        bounds = [world_size * bound for bound in bounds]
    check_lengths(bounds, world_size, kv_buffer.shape[1])
    return kv_buffer[:, position_order(cu_seqlens.new_tensor(bounds), world_size, kv_buffer.shape[1])]


def compute_kv_slices_for_groups(
    cu_seqlens_k: torch.Tensor,
    chunk_idx_0: int,
    chunk_idx_1: int,
    world_size: int,
    chunk_cu_seqlens_q_list: list[torch.Tensor],
    n_chunks: int = 2,
) -> list[KVSlice]:
    """Return the keys that each group sees under a causal mask: from a sequence's start to its chunk's end.

    `cu_seqlens_k [N + 1]` int32 are offsets in the local rows. `chunk_idx_0` and `chunk_idx_1` are the early and the
    late chunk of the rank. `world_size` and `n_chunks` are as in `split_q_by_zigzag_chunk_index`, which returns
    `chunk_cu_seqlens_q_list`.

    Returns:
        For each group, a list of (start, end) rows in the position-ordered buffer, one for each chunk in its
        `chunk_cu_seqlens_q_list`, and the `cu_seqlens` of these slices laid end to end.
    """
    world_size = check_world_size(world_size)
    bounds = [world_size * bound for bound in local_bounds("cu_seqlens_k", cu_seqlens_k, world_size)]
    chunks = {"chunk_idx_0": chunk_idx_0, "chunk_idx_1": chunk_idx_1}
    last = 2 * world_size - 1
    chunks = [check_int(name, x, 0, last, f"a chunk from 0 to {last}") for name, x in chunks.items()]
    n_chunks = check_n_chunks(n_chunks, world_size)
    check_list("chunk_cu_seqlens_q_list", chunk_cu_seqlens_q_list, n_chunks)
    slices = []
    for group, cu_seqlens_q in zip(
        _groups((chunks[0], chunks[1]), world_size, n_chunks), chunk_cu_seqlens_q_list, strict=True
    ):
        check_int32("chunk_cu_seqlens_q_list", cu_seqlens_q)
        ranges = [
            (start, start + (chunks[i] + 1) * (end - start) // (2 * world_size))
            for start, end in pairwise(bounds)
            for i in group
        ]
        if len(cu_seqlens_q) != len(ranges) + 1:
            raise ValueError(
                f"chunk_cu_seqlens_q_list: expected {len(ranges) + 1} offsets for the {len(bounds) - 1} sequences of "
                f"cu_seqlens_k, got {len(cu_seqlens_q)}"
            )
        slices.append((ranges, offsets(ranges, cu_seqlens_k)))
    return slices


def execute_grouped_attention(  # noqa: PLR0917  (a published name)
    chunk_q_list: list[torch.Tensor],
    chunk_cu_seqlens_q_list: list[torch.Tensor],
    chunk_indices_list: list[torch.Tensor],
    kv_buffer: torch.Tensor,
    kv_slices: list[KVSlice],
    nheads: int,
    head_dim: int,
    softmax_scale: float | None,
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    world_size: int,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Compute attention group by group, and return the results in local order; differentiable, also through lse.

    `chunk_q_list`, `chunk_cu_seqlens_q_list` and `chunk_indices_list` come from `split_q_by_zigzag_chunk_index`,
    `kv_slices` from `compute_kv_slices_for_groups`. `kv_buffer [2, W * T, kv_heads, head_dim]` has the rows of all
    ranks, rank after rank, where W is `world_size`; `cu_seqlens_k [N + 1]` are offsets in the local rows. Without
    `causal` every row sees its whole sequence, or the window around itself. `softmax_scale`, `dropout_p`,
    `window_size`, `alibi_slopes` and `deterministic` are as in the published function.

    Returns:
        out `[rows, nheads, head_dim]` and lse `[nheads, rows]` float32 of all rows in the groups, and a dict with
        `chunk_indices_list`, `chunk_cu_seqlens_q_list` and `kv_slices`.
    """
    mask = mask_of(causal, dropout_p, window_size, alibi_slopes)
    deterministic = check_flag("deterministic", deterministic)
    world_size = check_world_size(world_size)
    check_grouped(chunk_q_list, chunk_indices_list, kv_buffer, nheads, head_dim, world_size)
    check_list("chunk_cu_seqlens_q_list", chunk_cu_seqlens_q_list, len(chunk_q_list))
    for offsets_of_group in chunk_cu_seqlens_q_list:
        check_int32("chunk_cu_seqlens_q_list", offsets_of_group)
    check_slices(kv_slices, len(chunk_q_list), kv_buffer.shape[1])
    local_bounds("cu_seqlens_k", cu_seqlens_k, world_size, kv_buffer.shape[1] // world_size)
    kv_buffer, *chunk_q_list = cast_for_autocast(kv_buffer, *chunk_q_list)
    _, dtype, strides = describe(chunk_q_list[0])
    problem = make_problem(
        ArraySpec((kv_buffer.shape[1] // world_size, nheads, head_dim), dtype, strides),
        describe(kv_buffer[0]),
        describe(kv_buffer[1]),
        make_call_spec(head_dim=head_dim, backend="reference", softmax_scale=softmax_scale),
        sequences=len(cu_seqlens_k) - 1,
        world_size=world_size,
        target="reference",
    )
    sequences = _sequences(cu_seqlens_k, world_size)
    calls = make_calls(chunk_cu_seqlens_q_list, chunk_indices_list, kv_slices, sequences, mask.causal)
    rows = sum(len(call.rows) for call in calls)
    grouping = Grouping(calls, rows, cu_seqlens_k, world_size, mask, problem.call.softmax_scale, deterministic)
    k, v = kv_buffer
    out, lse = GroupedAttention.apply(grouping, None, k.shape[1], k, v, *chunk_q_list)
    return out, lse, chunk_info(chunk_indices_list, chunk_cu_seqlens_q_list, kv_slices)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    group: dist.ProcessGroup | None,
    *,
    heads_k_stride: int,
    mask: Mask,
    softmax_scale: float,
    deterministic: bool,
    n_chunks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]`) of this rank's rows, `heads_k_stride` KV heads at a time.

    `cu_seqlens [N + 1]` are offsets in the local rows. K/V are gathered over `group` in both passes; a `group` of None
    means a single device.
    """
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    chunks = split_q_by_zigzag_chunk_index(q, cu_seqlens, world_size, rank, n_chunks)
    of_rank = rank, 2 * world_size - 1 - rank
    kv_slices = compute_kv_slices_for_groups(cu_seqlens, *of_rank, world_size, chunks[1], n_chunks)
    calls = make_calls(*chunks[1:], kv_slices, _sequences(cu_seqlens, world_size), mask.causal)
    grouping = Grouping(calls, q.shape[0], cu_seqlens, world_size, mask, softmax_scale, deterministic)
    return GroupedAttention.apply(grouping, group, heads_k_stride, k, v, *chunks[0])


def chunk_info(chunk_indices_list: list, chunk_cu_seqlens_q_list: list, kv_slices: list) -> dict[str, list]:
    """Return the third result of `execute_grouped_attention`."""
    return {
        "chunk_indices_list": chunk_indices_list,
        "chunk_cu_seqlens_q_list": chunk_cu_seqlens_q_list,
        "kv_slices": kv_slices,
    }


class Call(NamedTuple):
    """One attention call: its local rows `[rows]`, and the ranges of position-ordered keys that they see."""

    rows: torch.Tensor
    ranges: list[tuple[int, int]]
    lengths: flash2.Lengths


@dataclass(frozen=True)
class Grouping:
    """The attention calls of one rank for one batch, for all heads and both passes; results have `tokens` rows."""

    calls: list[Call]
    tokens: int
    cu_seqlens: torch.Tensor
    world_size: int
    mask: Mask
    softmax_scale: float
    deterministic: bool


def make_calls(
    chunk_cu_seqlens_q_list: list[torch.Tensor],
    chunk_indices_list: list[torch.Tensor],
    kv_slices: list[KVSlice],
    sequences: list[tuple[int, int]],
    causal: bool,
) -> list[Call]:
    """Return an attention call for each group; the lists are as in `execute_grouped_attention`.

    `sequences` are the ranges of keys of whole sequences, which rows see without `causal`.
    """
    calls = []
    for cu_seqlens_q, rows, (ranges, cu_seqlens_k) in zip(
        chunk_cu_seqlens_q_list, chunk_indices_list, kv_slices, strict=True
    ):
        lengths = cu_seqlens_q.diff().tolist()
        if len(lengths) != len(ranges) or sum(lengths) != len(rows):
            raise ValueError(
                f"chunk_cu_seqlens_q_list: expected {len(ranges)} chunks of {len(rows)} rows in all, as in kv_slices "
                f"and chunk_indices_list, got {len(lengths)} of {sum(lengths)}"
            )
        keys_behind = None
        if ranges and not causal:
            per_sequence, ends = len(ranges) // len(sequences), [end for _, end in ranges]
            ranges = [sequence for sequence in sequences for _ in range(per_sequence)]
            keys_behind = cu_seqlens_k.new_tensor([whole - end for (_, whole), end in zip(ranges, ends, strict=True)])
            cu_seqlens_k = offsets(ranges, cu_seqlens_k)
        longest = max(lengths, default=0), max((end - start for start, end in ranges), default=0)
        calls.append(Call(rows, ranges, flash2.Lengths(cu_seqlens_q, cu_seqlens_k, *longest, keys_behind)))
    return calls


class GroupedAttention(torch.autograd.Function):
    """The autograd function `apply(grouping, group, heads_k_stride, k, v, *chunk_q)` -> (out, lse).

    The results have `grouping.tokens` rows. With a `group`, `k, v [T, kv_heads, head_dim]` have the rows of this rank,
    and are gathered in both passes, `heads_k_stride` heads at a time. Without one, k and v have all rows. dK/dV are
    summed in float32.
    """

    @staticmethod
    def forward(grouping: Grouping, group: dist.ProcessGroup | None, heads_k_stride: int, k, v, *chunk_q):
        _, heads, head_dim = chunk_q[0].shape
        out = k.new_zeros((grouping.tokens, heads, head_dim))
        lse = k.new_full((heads, grouping.tokens), float("-inf"), dtype=torch.float32)
        for first, *keys in _gathered(group, heads_k_stride, k, v):
            mine = _query_heads(first, keys[0].shape[1], heads // k.shape[1])
            keys = _in_position_order(grouping, *keys)
            for call, q in zip(grouping.calls, chunk_q, strict=True):
                if not len(q):
                    continue
                with region("unfused_forward", q.device):
                    k_slice, v_slice = (_slice(x, call) for x in keys)
                    options = call.lengths, grouping.mask, grouping.softmax_scale
                    results = flash2.forward(q[:, mine], k_slice, v_slice, *options)
                out[call.rows, mine], lse[mine, call.rows] = results
        return out, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        *constants, k, v = inputs[:5]
        ctx.save_for_backward(k, v, *output, *inputs[5:])
        ctx.constants = constants
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, dout, dlse):
        k, v, out, lse, *chunk_q = ctx.saved_tensors
        grouping, group, heads_k_stride = ctx.constants
        if group is not None:
            shapes = tuple(out.shape), tuple(k.shape), str(k.dtype)
            agree(group, (("call", BACKWARD), ("backend", "unfused"), ("out, k, dtype", shapes)))
        dout = torch.zeros_like(out) if dout is None else dout
        dchunk_q, dk, dv = [torch.zeros_like(q) for q in chunk_q], torch.empty_like(k), torch.empty_like(v)
        for first, *keys in _gathered(group, heads_k_stride, k, v):
            mine = _query_heads(first, keys[0].shape[1], out.shape[1] // k.shape[1])
            keys = _in_position_order(grouping, *keys)
            dkeys = [torch.zeros_like(x, dtype=torch.float32) for x in keys]
            for call, q, dq in zip(grouping.calls, chunk_q, dchunk_q, strict=True):
                if not len(q):
                    continue
                dlse_rows = None if dlse is None else dlse[mine, call.rows]
                results = out[call.rows, mine], lse[mine, call.rows]
                options = call.lengths, grouping.mask, grouping.softmax_scale, grouping.deterministic
                with region("unfused_backward", q.device):
                    k_slice, v_slice = (_slice(x, call) for x in keys)
                    residuals = Residuals(q[:, mine], k_slice, v_slice, *results)
                    gradients = flash2.backward(residuals, dout[call.rows, mine], dlse_rows, *options)
                dq[:, mine], *dslices = gradients
                _add_slices(dkeys, dslices, call)
            for into, dx in zip((dk, dv), dkeys, strict=True):
                buffer = torch.empty_like(dx)
                buffer[_order(grouping, len(dx))] = dx
                local = buffer if group is None else buffer.new_empty((len(k), *buffer.shape[1:]))
                if group is not None:
                    reduce_into(local, buffer, group)
                into[:, first : first + local.shape[1]] = local
        return None, None, None, dk, dv, *dchunk_q

    jvp = staticmethod(refuse_derivative)


def _gathered(group: dist.ProcessGroup | None, heads_k_stride: int, k: torch.Tensor, v: torch.Tensor):
    """Return (first KV head, k, v `[W * T, heads_k_stride, head_dim]`) of all ranks, for each window of KV heads."""
    return [(0, k, v)] if group is None else windows(k, v, heads_k_stride, group, streams_of(k.device))


def _query_heads(first: int, kv_heads: int, shared: int) -> slice:
    """Return the query heads of the KV heads from `first` on."""
    return slice(first * shared, (first + kv_heads) * shared)


def _order(grouping: Grouping, total: int) -> torch.Tensor:
    return position_order(grouping.cu_seqlens * grouping.world_size, grouping.world_size, total)


def _in_position_order(grouping: Grouping, *keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return keys if grouping.world_size == 1 else tuple(x[_order(grouping, len(x))] for x in keys)


def _slice(x: torch.Tensor, call: Call) -> torch.Tensor:
    """Return the keys or values of one call, `[keys, kv_heads, head_dim]`."""
    return torch.cat([x[start:end] for start, end in call.ranges])


def _add_slices(totals: list[torch.Tensor], slices: list[torch.Tensor], call: Call) -> None:
    """Add the gradients of slices to `totals`: the transpose of `_slice`."""
    lengths = [end - start for start, end in call.ranges]
    for total, x in zip(totals, slices, strict=True):
        for (start, end), part in zip(call.ranges, x.split(lengths), strict=True):
            total[start:end] += part


def _groups(chunks: tuple[int, int], world_size: int, n_chunks: int) -> list[list[int]]:
    """Return, for each of `n_chunks` groups, the numbers (0: early, 1: late) of a rank's `chunks` that belong to it."""
    n_chunks = check_n_chunks(n_chunks, world_size)
    per_group = 2 * world_size // n_chunks
    of_chunk = [min(chunk // per_group, n_chunks - 1) for chunk in chunks]
    return [[i for i in (0, 1) if of_chunk[i] == group] for group in range(n_chunks)]


def _sequences(cu_seqlens: torch.Tensor, world_size: int) -> list[tuple[int, int]]:
    """Return (start, end) of every sequence in the position-ordered keys; `cu_seqlens` is local."""
    return list(pairwise(world_size * bound for bound in cu_seqlens.tolist()))


def offsets(ranges: list[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """Return `cu_seqlens` of `ranges` laid end to end, on the device of `like`."""
    return like.new_tensor(list(accumulate((end - start for start, end in ranges), initial=0)))
