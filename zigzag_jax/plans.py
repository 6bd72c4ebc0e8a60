"""Plans of documents as arrays: the offsets, rows and positions of a rank in a plan."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.documents import DocumentPlan, check_plan
from zigzag_kernels.modes import Layout

from .arguments import Array, as_rank, as_rank_argument, check_array
from .axes import gather_rows
from .host import ShardedBatch


class Parts(NamedTuple):
    """The two parts of a rank's rows: whole documents and their padding, then chunks of split documents.

    `prepare_batch` takes `Parts` in place of `cu_seqlens`. The arrays are int32.

    Attributes:
        whole_cu_seqlens: `[N + 1]`, offsets of this rank's whole documents in its rows.
        split_cu_seqlens: `[M + 1]`, offsets of the split documents over all ranks, including their padding.
        split_lengths: `[M]`, real tokens of the split documents.
        whole_tokens: rows of each rank for whole documents, including padding.
        tokens: rows of each rank.
    """

    whole_cu_seqlens: Array
    split_cu_seqlens: Array
    split_lengths: Array
    whole_tokens: int
    tokens: int

    @staticmethod
    def of_plan(plan: DocumentPlan, rank: int | Array) -> "Parts":
        """Return the parts of `rank`, which may be traced, in a plan."""
        whole = _of_rank(plan.whole_cu_seqlens, plan, rank)
        split, lengths = (np.array(x, np.int32) for x in (plan.split_cu_seqlens, plan.split_lengths))
        return Parts(whole, split, lengths, plan.whole_tokens, plan.tokens)


def offsets_of(batch: ShardedBatch, world_size: int, layout: str) -> tuple[Array | Parts, int | None]:
    """Return (parts, None) of a batch of the data path, or in the row layout (offsets, `row_length`).

    Arrays of all ranks give the parts of all ranks. Raises `ValueError` for a batch of another `world_size`
    or `layout`.
    """
    for name, expected, got in (("world_size", batch.world_size, world_size), ("layout", batch.layout, str(layout))):
        if expected != got:
            raise ValueError(f"{name}: expected that of the batch, {expected!r}, got {got!r}")
    if batch.layout == Layout.ROW:
        return batch.cu_seqlens, world_size * batch.tokens if world_size > 1 else None
    offsets = batch.whole_cu_seqlens, batch.cu_seqlens, batch.lengths
    return Parts(*offsets, batch.whole_tokens, batch.tokens), None


def parts_of_all(given: DocumentPlan | Parts, world_size: int, layout: str) -> Parts:
    """Return the parts of all ranks, with the `whole_cu_seqlens` of rank 0, then of rank 1, and so on."""
    if layout != Layout.DOCUMENT:
        raise ValueError(f"layout: expected 'document' with a plan, got {str(layout)!r}")
    if isinstance(given, Parts):
        return given
    parts = [Parts.of_plan(check_plan(given, world_size), rank) for rank in range(world_size)]
    return parts[0]._replace(whole_cu_seqlens=jnp.concatenate([part.whole_cu_seqlens for part in parts]))


def one_part(parts: Parts, world_size: int) -> tuple[Array, Array | None, Parts | None]:
    """Return (cu_seqlens, real lengths, `parts`), or None in place of `parts` if the offsets describe all rows.

    A single rank has both parts in one batch, in which the padding between them is a document without real tokens.
    """
    whole, split, lengths, whole_tokens, tokens = parts
    if world_size > 1:
        return split, lengths, parts if whole_tokens else None
    if whole_tokens == tokens:
        return whole, None, None
    whole, split, lengths = (jnp.asarray(x) for x in (whole, split, lengths))
    real = jnp.concatenate((jnp.diff(whole), jnp.zeros(1, jnp.int32), lengths))
    return jnp.concatenate((whole, split + whole_tokens)), real, None


def shard_by_plan(x: Array, plan: DocumentPlan, rank: int | Array) -> jax.Array:
    """Return the rows of `rank` from the concatenated documents `x [tokens of all documents, ...]`; padding is 0."""
    check_array("x", x)
    rows = _of_rank(plan.rows, plan, rank)
    if not x.ndim or x.shape[0] != sum(plan.lengths):
        raise ValueError(f"x: expected the {sum(plan.lengths)} tokens of the plan, got shape {x.shape}")
    x = gather_rows(jnp.asarray(x))
    taken = x[jnp.maximum(rows, 0)] if len(x) else jnp.zeros((plan.tokens, *x.shape[1:]), x.dtype)
    return jnp.where((rows >= 0).reshape(-1, *(1,) * (x.ndim - 1)), taken, jnp.zeros((), x.dtype))


def unshard_by_plan(x: Array, plan: DocumentPlan) -> jax.Array:
    """Return `x [W * T, ...]`, rank-major rows, in the order of the documents, without padding."""
    check_array("x", x)
    total = plan.world_size * plan.tokens
    if not x.ndim or x.shape[0] != total:
        raise ValueError(f"x: expected the {total} rows of all ranks in the plan, got shape {x.shape}")
    rows = np.concatenate([plan.rows(rank) for rank in range(plan.world_size)]).astype(np.int64)
    held = np.flatnonzero(rows >= 0)
    order = np.empty(len(held), np.int64)
    order[rows[held]] = held
    return gather_rows(jnp.asarray(x))[order]


def positions_of_plan(plan: DocumentPlan, rank: int | Array, tokens: int | None) -> jax.Array:
    """Return `[T]` int32, the position of every row of `rank` in its document; 0 for padding."""
    if tokens not in (None, plan.tokens):
        raise ValueError(f"tokens: expected None or those of the plan, {plan.tokens}, got {tokens}")
    return _of_rank(plan.positions, plan, rank)


def _of_rank(numbers: Callable[[int], list[int]], plan: DocumentPlan, rank: int | Array) -> jax.Array:
    """Return the `numbers` of `rank`, which may be traced; JAX clamps an invalid traced rank to the nearest one."""
    rank = as_rank_argument(rank, plan.world_size)
    if isinstance(rank, int):
        return jnp.asarray(numbers(rank), jnp.int32)
    of_ranks = [numbers(other) for other in range(plan.world_size)]
    return jnp.asarray(of_ranks, jnp.int32)[as_rank(rank)[0]]
