"""The limits of the kernels, and the checks of single arguments: errors name the argument, what was expected, and got.

Checks of how arrays go together are in `problem.make_problem`.
"""

import math
from itertools import pairwise

from .modes import Backend, Method

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 8, 256, 8
MAX_ROWS = 2**30  # sums of two row numbers are int32 in the kernels
MAX_TILE_OFFSET = 2**31 - 1  # offsets inside a tile are int32; the offset of the tile itself is int64
MAX_BLOCK = 256
METHODS = tuple(method.value for method in Method)


def batch_shape(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], has_cu_seqlens: bool
) -> tuple[int, int] | None:
    """Return (batch, T) of shapes `[batch, T, heads, head_dim]`, or None for packed ones; `ValueError` for others."""
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
    """Raise `ValueError` for (token, head) strides that put the rows of one tile 2**31 elements apart or more."""
    token, head = strides
    if min(strides) < 0 or (MAX_BLOCK - 1) * token + (group - 1) * head > MAX_TILE_OFFSET:
        raise ValueError(
            f"{name}: expected strides that keep a tile within 2**31 elements, got {strides}; copy it first"
        )


def check_world_size(world_size: int) -> None:
    """Raise `ValueError` unless `world_size` is a positive int."""
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size: expected a positive int, got {world_size!r}")


def check_rank(rank, world_size: int, is_array: bool) -> None:
    """Raise `ValueError` unless `rank` is one of `world_size`, or an array (`is_array`) of one integer.

    The value of an array may be on a device and is not looked at.
    """
    if is_array:
        shape, dtype = tuple(rank.shape), str(rank.dtype).removeprefix("torch.")
        if math.prod(shape) != 1 or "int" not in dtype:
            raise ValueError(f"rank: expected an int or an array of one integer, got shape {shape} {dtype}")
    elif isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank: expected an int or an array of one integer, got {type(rank).__name__}")
    elif not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")


def check_softmax_scale(softmax_scale: float) -> None:
    """Raise `ValueError` unless `softmax_scale` is a positive finite Python number."""
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise ValueError(f"softmax_scale: expected a Python number, got {type(softmax_scale).__name__}")
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: expected a positive finite number, got {softmax_scale}")


def check_cu_seqlens(shape: tuple[int, ...], dtype: str) -> None:
    """Raise `ValueError` unless an array of this shape and dtype name can be `cu_seqlens [N + 1]` int32."""
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {shape}")
    if dtype != "int32":
        raise ValueError(f"cu_seqlens: expected dtype int32, got {dtype}")


def check_lengths(cu_seqlens: list[int], world_size: int, total: int | None = None) -> None:
    """Raise `ValueError` unless sequences of these offsets, on the host, can be dealt out to `world_size` ranks.

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
    """Raise `ValueError` unless `method` is a way of moving K/V between ranks: see `modes.Method`."""
    if method not in METHODS:
        raise ValueError(f"method: expected {' or '.join(map(repr, METHODS))}, got {method!r}")


def check_target(target: str) -> None:
    """Raise `RuntimeError` for a GPU that the kernels do not run on."""
    if target != Backend.INTERPRET and float(target) < 8.0:
        raise RuntimeError(f"the kernels need a GPU of compute capability 8.0 or newer, got {target}")


def check_flag(name: str, flag: bool) -> None:
    """Raise `ValueError` unless the argument `name` is True or False."""
    if not isinstance(flag, bool):
        raise ValueError(f"{name}: expected True or False, got {flag!r}")
