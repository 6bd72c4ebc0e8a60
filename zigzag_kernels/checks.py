"""The limits of the kernels, and the checks of single arguments.

An error names the argument, the expected value and the value that was passed. `problem.make_problem` checks that the
arrays of a call fit each other.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from .layout import MAX_OFFSET
from .modes import Backend, Layout, Method

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 8, 256, 8
MAX_ROWS = 2**30  # the kernels add two row numbers in int32
MAX_TILE_OFFSET = 2**31 - 1  # elements; offsets inside a tile are int32, the offset of the tile itself is int64
MAX_BLOCK = 256
MAX_RANKS = 2**20  # the kernels hold chunk numbers, and their products with rows, in int32
MAX_TOTAL = 2**40  # rows of a whole batch with its padding: far above MAX_OFFSET, and safe in int64
# Local rows that `cu_seqlens` alone may ask for; a larger number means that the array holds garbage, not a batch.
MAX_DEFAULT_ROWS = 2**27
# Between these limits softmax_scale, and its products with scores, are normal float32 numbers.
SCALES = 1e-30, 1e30
# Between these limits a cap, its inverse and its products with scores are normal float32 numbers.
SOFTCAPS = 1e-6, 1e6
METHODS = tuple(method.value for method in Method)
LAYOUTS = tuple(layout.value for layout in Layout)


def batch_shape(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], has_cu_seqlens: bool
) -> tuple[int, int] | None:
    """Return (batch, T) of shapes `[batch, T, heads, head_dim]`, or None for packed shapes.

    Raises `ValueError` for any other shape.
    """
    if len(q) == 3:
        return None
    if len(q) != 4:
        raise ValueError(f"q: expected [tokens, heads, head_dim] or [batch, T, heads, head_dim], got shape {q}")
    if has_cu_seqlens:
        raise ValueError(
            "cu_seqlens: expected None with q [batch, T, heads, head_dim] in the layout 'document', got offsets or a "
            f"batch beside q of shape {q}; pass [tokens, heads, head_dim], or layout='row' for packed rows"
        )
    for name, shape in {"k": k, "v": v}.items():
        if len(shape) != 4 or shape[:2] != q[:2]:
            raise ValueError(f"{name}: expected [batch, T] = {list(q[:2])} as in q, got shape {shape}")
    return q[0], q[1]


def check_strides(name: str, strides: tuple[int, int], group: int) -> None:
    """Raise `ValueError` for (token, head) strides with which a tile spans 2**31 elements or more."""
    token, head = strides
    if min(strides) < 0 or (MAX_BLOCK - 1) * token + (group - 1) * head > MAX_TILE_OFFSET:
        raise ValueError(
            f"{name}: expected strides that keep a tile within 2**31 elements, got {strides}; copy it first"
        )


def python_value(x):
    """Return the Python value of a NumPy scalar, and any other value unchanged."""
    return x.item() if type(x).__module__ == "numpy" and getattr(x, "shape", None) == () else x


def check_int(name: str, x, least: int, most: int | None = None, expected: str = "") -> int:
    """Return `x` as an int; `ValueError` unless it is an int from `least` to `most`, which `expected` describes."""
    x = python_value(x)
    if isinstance(x, bool) or not isinstance(x, int) or x < least or (most is not None and x > most):
        raise ValueError(f"{name}: expected {expected or f'an int of at least {least}'}, got {x!r}")
    return x


def check_world_size(world_size: int) -> int:
    """Return `world_size` as a Python int; `ValueError` unless it is a number of ranks."""
    world_size = check_int("world_size", world_size, 1, expected="a positive int")
    return check_int("world_size", world_size, 1, MAX_RANKS, f"at most {MAX_RANKS} ranks")


def check_rank(rank, world_size: int, is_array: bool):
    """Return `rank`; `ValueError` unless it is from 0 to `world_size - 1`, or an array of one integer (`is_array`).

    An array may be on a device, so its value is not read.
    """
    if is_array:
        shape, dtype = tuple(rank.shape), dtype_name(rank)
        if math.prod(shape) != 1 or "int" not in dtype:
            raise ValueError(f"rank: expected an int or an array of one integer, got shape {shape} {dtype}")
        return rank
    rank = python_value(rank)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank: expected an int or an array of one integer, got {type(rank).__name__}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    return rank


def check_softmax_scale(softmax_scale: float) -> float:
    """Return `softmax_scale` as a float; `ValueError` unless it is positive and within `SCALES`."""
    softmax_scale = python_value(softmax_scale)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise ValueError(f"softmax_scale: expected a Python number, got {type(softmax_scale).__name__}")
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: expected a positive finite number, got {softmax_scale}")
    least, most = SCALES
    if not least <= softmax_scale <= most:
        raise ValueError(f"softmax_scale: expected a number from {least} to {most}, got {softmax_scale}")
    return float(softmax_scale)


def check_window_size(window_size) -> tuple[int, int]:
    """Return `window_size` as (left, right); `ValueError` unless both are numbers of tokens.

    -1 and None mean no limit on that side; -1 is returned for both.
    """
    expected = "window_size: expected (left, right), tokens on each side of a token, -1 for all"
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"{expected}, got {window_size!r}")
    sides = [-1 if side is None else python_value(side) for side in window_size]
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, int) or not -1 <= side <= MAX_OFFSET:
            raise ValueError(f"{expected}, got {window_size!r}")
    left, right = (-1 if side >= MAX_ROWS else side for side in sides)  # every sequence is shorter: no limit
    return left, right


def check_attention_chunk(attention_chunk: int) -> int:
    """Return `attention_chunk` as an int; `ValueError` unless it is a number of tokens, or 0 for no chunks."""
    attention_chunk = check_int("attention_chunk", attention_chunk, 0, MAX_OFFSET, "a number of tokens, or 0 for none")
    return 0 if attention_chunk >= MAX_ROWS else attention_chunk


def check_softcap(softcap: float) -> float:
    """Return `softcap` as a float; `ValueError` unless it is within `SOFTCAPS`, or 0 for no cap."""
    softcap = python_value(softcap)
    if isinstance(softcap, bool) or not isinstance(softcap, int | float):
        raise ValueError(f"softcap: expected a Python number, got {type(softcap).__name__}")
    least, most = SOFTCAPS
    if softcap != 0 and not least <= softcap <= most:
        raise ValueError(f"softcap: expected a number from {least} to {most}, or 0 for none, got {softcap}")
    return float(softcap)


def check_layout(layout: str) -> Layout:
    """Return `layout` as a member of `modes.Layout`; `ValueError` unless it is one."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {' or '.join(map(repr, LAYOUTS))}, got {layout!r}")
    return Layout(layout)


def dtype_name(x) -> str:
    """Return the name of the dtype of an array of any framework."""
    return str(x.dtype).removeprefix("torch.")


def check_dtype(name: str, dtype: str) -> str:
    """Return `dtype`; `ValueError` unless it is the name of a type that the kernels take."""
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name}: expected {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return dtype


def check_cu_seqlens(shape: tuple[int, ...], dtype: str, name: str = "cu_seqlens") -> None:
    """Raise `ValueError` unless an array of this shape and dtype name can be `cu_seqlens [N + 1]`."""
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{name}: expected shape [N + 1], got {shape}")
    if "int" not in dtype:
        raise ValueError(f"{name}: expected dtype int32, or other integers, got {dtype}")


def check_offsets(values, name: str = "cu_seqlens") -> list[int]:
    """Return the offsets in a list or tuple as Python ints; `ValueError` unless int32 holds each of them."""
    offsets = [python_value(value) for value in values]
    if not offsets:
        raise ValueError(f"{name}: expected [N + 1] integers, got none")
    for i, value in enumerate(offsets):
        if isinstance(value, bool) or not isinstance(value, int):
            shown = repr(value) if isinstance(value, str | int | float) else ""  # an array would fill the screen
            raise ValueError(f"{name}: expected integers, got {type(value).__name__} {shown}".rstrip() + f" at [{i}]")
        if not -MAX_OFFSET <= value <= MAX_OFFSET:
            raise ValueError(f"{name}: expected integers that int32 holds, got {value} at [{i}]")
    return offsets


def check_lengths(cu_seqlens: list[int], world_size: int, total: int | None = None, name: str = "cu_seqlens") -> None:
    """Raise `ValueError` unless sequences with these offsets can be distributed over `world_size` ranks.

    The offsets are on the host. `total` is the number of rows of the packed batch; rows behind the last sequence are
    padding.
    """
    if total is not None:
        total = check_int("total", total, 0, MAX_TOTAL, "a number of rows")
    if cu_seqlens[0] != 0:
        raise ValueError(f"{name}: expected to begin with 0, got {cu_seqlens[0]}")
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        if end < start:
            raise ValueError(f"{name}: expected no decrease, got {start} then {end} (sequence {i})")
        if world_size > 1 and (end - start) % (2 * world_size):
            raise ValueError(
                f"{name}: expected lengths that are multiples of 2 * world_size = {2 * world_size}, "
                f"got {end - start} (sequence {i}); pad_to_zigzag makes them so"
            )
    if total is not None and cu_seqlens[-1] > total:
        raise ValueError(f"{name}: expected to end at or before the {total} rows there are, got {cu_seqlens[-1]}")


def check_sinks(shape: tuple[int, ...], dtype: str, heads: int) -> None:
    """Raise `ValueError` unless an array of this shape and dtype name can be `sinks [heads]`."""
    if tuple(shape) != (heads,):
        raise ValueError(f"sinks: expected shape [heads] = ({heads},) as in q, got {tuple(shape)}")
    if "float" not in dtype:
        raise ValueError(f"sinks: expected floating-point numbers, got {dtype}")


def check_real_lengths_array(shape: tuple[int, ...], dtype: str, sequences: int) -> None:
    """Raise `ValueError` unless an array of this shape and dtype name can be the real `lengths [N]` of sequences."""
    if tuple(shape) != (sequences,):
        raise ValueError(
            f"lengths: expected shape [N] = ({sequences},), one for each sequence of cu_seqlens, got {tuple(shape)}"
        )
    if "int" not in dtype:
        raise ValueError(f"lengths: expected dtype int32, or other integers, got {dtype}")


def check_real_lengths(lengths: Sequence[int], cu_seqlens: list[int], name: str = "lengths") -> None:
    """Raise `ValueError` unless each sequence has at least as many rows as real tokens.

    All values are on the host.
    """
    for i, (length, (start, end)) in enumerate(zip(lengths, pairwise(cu_seqlens), strict=True)):
        if not 0 <= length <= end - start:
            raise ValueError(
                f"{name}: expected real lengths from 0 to the {end - start} rows of the sequence, "
                f"got {length} (sequence {i})"
            )


def check_packed_rows(row_length: int | None, rows: int, world_size: int) -> tuple[int, int]:
    """Return (row_length, rows): the tokens of a packed row over all ranks, and the number of packed rows.

    Raises `ValueError` unless rows of that length can be cut into `2 * world_size` chunks. A single rank does not cut
    rows, so that it accepts any length.
    """
    step = 2 * world_size if world_size > 1 else 1
    tokens = "the tokens of one packed row on all ranks"
    expected = f"a multiple of 2 * world_size = {step}, {tokens}" if world_size > 1 else tokens
    row_length = check_int("row_length", row_length, 0, MAX_OFFSET, expected)
    if row_length % step:
        raise ValueError(f"row_length: expected {expected}, got {row_length}")
    return row_length, check_int("rows", rows, 1, MAX_OFFSET, "a positive number of packed rows")


def check_method(method: str) -> None:
    """Raise `ValueError` unless `method` names a member of `modes.Method`."""
    if method not in METHODS:
        raise ValueError(f"method: expected {', '.join(map(repr, METHODS[:-1]))} or {METHODS[-1]!r}, got {method!r}")


def check_target(target: str) -> None:
    """Raise `RuntimeError` for a GPU that the kernels do not run on."""
    if target != Backend.INTERPRET and float(target) < 8.0:
        raise RuntimeError(f"the kernels need a GPU of compute capability 8.0 or newer, got {target}")


def check_flag(name: str, flag: bool) -> bool:
    """Return the argument `name` as a Python bool; `ValueError` unless it is True or False."""
    flag = python_value(flag)
    if not isinstance(flag, bool):
        raise ValueError(f"{name}: expected True or False, got {flag!r}")
    return flag


def check_rows(name: str, shape: tuple[int, ...], world_size: int, end: int | None = None) -> int:
    """Return how many rows of an array of this shape each rank has.

    Raises `ValueError` unless all ranks get the same number of rows, or if there are fewer than the `end` rows that
    `cu_seqlens` describe.
    """
    if not shape:
        raise ValueError(f"{name}: expected [total, ...], got shape ()")
    if shape[0] % world_size:
        raise ValueError(f"{name}: expected a multiple of world_size = {world_size} rows, got {shape[0]}")
    if end is not None and end > shape[0]:
        raise ValueError(
            f"{name}: expected [total, ...] with the {end} rows of cu_seqlens or more, got shape {shape}; "
            "a [batch, tokens] array is given row by row"
        )
    return shape[0] // world_size


def check_fill(name: str, value, dtype: str, limits: tuple[float, float]):
    """Return `value` as a Python number; `ValueError` unless an array of `dtype` can hold it.

    `limits` are the smallest and the largest number of that dtype.
    """
    value = python_value(value)
    least, most = limits
    whole = "int" in dtype
    number = isinstance(value, int) if whole else isinstance(value, int | float)
    if not number or (isinstance(value, bool) and dtype != "bool"):
        raise ValueError(f"{name}: expected {'an integer' if whole else 'a number'} for {dtype}, got {value!r}")
    if (whole or math.isfinite(value)) and not least <= value <= most:
        raise ValueError(f"{name}: expected a number that {dtype} holds, from {least} to {most}, got {value}")
    return value


def check_default_rows(rows: int) -> int:
    """Return `rows`, the local rows that `cu_seqlens` describe; `ValueError` above `MAX_DEFAULT_ROWS`.

    A caller who needs more rows must pass `tokens`.
    """
    if rows > MAX_DEFAULT_ROWS:
        raise ValueError(f"tokens: expected a number, as {rows} local rows are above {MAX_DEFAULT_ROWS}, got None")
    return rows
