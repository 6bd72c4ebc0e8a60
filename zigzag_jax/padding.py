"""Functions that pad a packed batch so that it can be distributed over ranks, and that remove the padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.batch_checks import check_padded_total
from zigzag_kernels.checks import check_fill, check_layout, check_lengths, check_rows, check_world_size
from zigzag_kernels.layout import padded_length
from zigzag_kernels.modes import Layout

from .arguments import Array, check_array, mark_padded, on_host
from .axes import gather_rows
from .surroundings import under_own_promotion


@under_own_promotion
def pad_to_zigzag(
    x: Array,
    cu_seqlens: Array,
    world_size: int,
    total: int | None = None,
    *,
    value: float = 0,
    layout: str = "document",
    row_length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Pad a batch with `value` for its distribution over ranks: each document, or in the row layout the end.

    Args:
        x: `[rows, ...]`, the packed batch.
        cu_seqlens: `[N + 1]` int32, its offsets, which are read on the host: `ValueError` if traced.
        world_size: W, the number of ranks; a single rank needs no padding.
        total: number of rows of the result, filled up with `value` behind the last document: a multiple of W in the
            document layout; whole packed rows, or a multiple of 2W, in the row layout. None: as few as possible.
        value: 0 for tokens; for labels, the index that the loss ignores, such as -100.
        layout: "document", where lengths become multiples of 2W, or "row", where documents keep their lengths.
        row_length: tokens of a packed row over all ranks, in the row layout; None is one row of all tokens.

    Returns:
        (padded `x`, its `cu_seqlens`). In the document layout, padding tokens are keys at the end of their document.
        With a causal mask no real token attends to them; without it, every real token would. For `causal=False`, give
        `prepare_batch` the real `lengths`. Without them, attention raises an error for the `cu_seqlens` of this
        function, and for a batch that was prepared from them; a copy of the offsets, or a traced array, looks like
        offsets without padding. In the row layout padding belongs to no document, so that every mask is correct.
    """
    check_array("x", x)
    layout = check_layout(layout)
    lengths = _host_lengths(x, cu_seqlens, world_size)
    padded = lengths if layout is Layout.ROW else [padded_length(length, world_size) for length in lengths]
    total = check_padded_total(sum(padded), total, layout, row_length, world_size)
    x = gather_rows(jnp.asarray(x))
    fill = jnp.asarray(check_fill("value", value, str(x.dtype), _limits(x.dtype)), x.dtype)
    rows, new_cu_seqlens = _padded_rows(lengths, padded)
    source = np.full((total, *(1,) * (x.ndim - 1)), -1)
    source[rows, ...] = np.arange(len(rows)).reshape(-1, *source.shape[1:])
    result = jnp.full((total, *x.shape[1:]), fill)
    if len(rows):
        result = jnp.where(source >= 0, x[np.maximum(source.ravel(), 0)], fill)
    new_cu_seqlens = jnp.asarray(new_cu_seqlens)
    if padded != lengths:
        mark_padded(new_cu_seqlens)
    return result, new_cu_seqlens


def _limits(dtype: np.dtype) -> tuple[float, float]:
    if dtype == jnp.bool_:
        return 0, 1
    limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype)
    whole = jnp.issubdtype(dtype, jnp.integer)
    return (int(limits.min), int(limits.max)) if whole else (float(limits.min), float(limits.max))


@under_own_promotion
def unpad(x: Array, cu_seqlens: Array, world_size: int, *, layout: str = "document") -> jax.Array:
    """Undo `pad_to_zigzag`: return the rows of a padded batch that are not padding.

    Args:
        x: `[rows, ...]`, the padded batch.
        cu_seqlens: `[N + 1]` int32, the offsets before padding, which are read on the host: `ValueError` if traced.
        world_size: number of ranks.
        layout: as for `pad_to_zigzag`.
    """
    layout = check_layout(layout)
    lengths = _host_lengths(None, cu_seqlens, world_size)
    padded = lengths if layout is Layout.ROW else [padded_length(length, world_size) for length in lengths]
    check_array("x", x)
    if not x.ndim or x.shape[0] < sum(padded):
        raise ValueError(
            f"x: expected at least the {sum(padded)} rows of the padded batch, got {x.shape[0] if x.ndim else 'none'}"
        )
    return gather_rows(jnp.asarray(x))[_padded_rows(lengths, padded)[0]]


def _host_lengths(x: Array | None, cu_seqlens: Array, world_size: int) -> list[int]:
    check_world_size(world_size)
    starts = on_host(cu_seqlens)
    check_lengths(starts, 1)
    if x is not None:
        check_rows("x", x.shape, 1, starts[-1])
    return [end - start for start, end in itertools.pairwise(starts)]


def _padded_rows(lengths: list[int], padded: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (row of each original row in the padded batch, padded `cu_seqlens`), int32."""
    starts = np.cumsum([0, *padded], dtype=np.int32)
    shift = np.repeat(starts[:-1] - np.cumsum([0, *lengths], dtype=np.int32)[:-1], lengths)
    return np.arange(sum(lengths), dtype=np.int32) + shift, starts
