"""Checks and conversions of single arguments that are arrays; `zigzag_kernels.checks` has the rules."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from zigzag_kernels.checks import (
    check_cu_seqlens,
    check_flag,
    check_lengths,
    check_offsets,
    check_rank,
    check_real_lengths,
    check_real_lengths_array,
    check_sinks,
    check_world_size,
)
from zigzag_kernels.layout import MAX_OFFSET
from zigzag_kernels.modes import Layout

from .axes import gather_rows

Array = jax.Array | np.ndarray
_padded: "weakref.WeakValueDictionary[int, jax.Array]" = weakref.WeakValueDictionary()


def check_array(name: str, x) -> None:
    """Raise `ValueError` unless `x` is a JAX or NumPy array; traced arrays are JAX arrays."""
    if not isinstance(x, Array):
        raise ValueError(f"{name}: expected an array of JAX or NumPy, got {type(x).__name__}")


def as_cu_seqlens(cu_seqlens, world_size: int, total: int | None = None) -> jax.Array:
    """Return offsets as an array `[N + 1]` int32; the values of a JAX array are not read.

    A list, tuple or NumPy array is checked like in `validate`, with the `total` rows that there are. In a JAX array,
    integers that int32 cannot hold become -1, for which attention returns NaN. Raises `ValueError` for anything else.
    """
    if isinstance(cu_seqlens, list | tuple):
        cu_seqlens = np.array(check_offsets(cu_seqlens), np.int64)
    check_array("cu_seqlens", cu_seqlens)
    check_cu_seqlens(cu_seqlens.shape, str(cu_seqlens.dtype))
    if isinstance(cu_seqlens, np.ndarray):
        check_lengths(check_offsets(cu_seqlens.tolist()), world_size, total)
        cu_seqlens = cu_seqlens.astype(np.int32)
    return _as_int32(gather_rows(jnp.asarray(cu_seqlens)))


def as_lengths(lengths, cu_seqlens) -> jax.Array:
    """Return the real `lengths` of the sequences of `cu_seqlens` as an array `[N]` int32.

    Both arguments are as the caller passed them. Lists, tuples and NumPy arrays are checked; the values of JAX arrays
    are not read. Raises `ValueError` for anything else.
    """
    on_host = all(isinstance(x, list | tuple | np.ndarray) for x in (lengths, cu_seqlens))
    if isinstance(lengths, list | tuple):
        lengths = np.array(check_offsets(lengths, "lengths") if lengths else [], np.int64)
    check_array("lengths", lengths)
    check_real_lengths_array(lengths.shape, str(lengths.dtype), len(cu_seqlens) - 1)
    if isinstance(lengths, np.ndarray) and lengths.size:
        check_offsets(lengths.tolist(), "lengths")  # JAX would silently drop the upper bits of larger integers
    if on_host:
        check_real_lengths(lengths.tolist(), np.asarray(cu_seqlens).tolist())
    return _as_int32(gather_rows(jnp.asarray(lengths)))


def as_sinks(sinks: Array, heads: int) -> jax.Array:
    """Return `sinks [heads]` of any floating-point type as float32; `ValueError` for anything else."""
    check_array("sinks", sinks)
    check_sinks(sinks.shape, str(sinks.dtype), heads)
    return jnp.asarray(sinks).astype(jnp.float32)


def _as_int32(x: jax.Array) -> jax.Array:
    """Return the integers `x` as int32, with -1 in place of integers that int32 cannot hold."""
    if x.dtype == jnp.int32:
        return x
    if jnp.can_cast(x.dtype, jnp.int32):
        return x.astype(jnp.int32)
    held = (x >= jnp.asarray(0, x.dtype)) & (x <= jnp.asarray(MAX_OFFSET, x.dtype))
    return jnp.where(held, x.astype(jnp.int32), jnp.int32(-1))


def check_held(name: str, x: Array) -> None:
    """Raise `ValueError` for a NumPy array with integers whose upper bits JAX would drop."""
    if isinstance(x, np.ndarray) and x.size:
        kept = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
        if x.min() < kept.min or x.max() > kept.max:
            raise ValueError(f"{name}: expected integers that {kept.dtype} holds, got {x.min()} to {x.max()}")


def as_rank_argument(rank, world_size: int) -> int | Array:
    """Return `rank`, an int, or an array of one integer whose value is not read.

    Raises `ValueError` for anything else, and for an int that is not from 0 to `world_size - 1`.
    """
    return check_rank(rank, world_size, isinstance(rank, jax.Array) or (isinstance(rank, np.ndarray) and rank.ndim > 0))


def check_batch(
    cu_seqlens, rank, world_size: int, layout: Layout = Layout.DOCUMENT
) -> tuple[jax.Array, int | Array, int]:
    """Return the checked (cu_seqlens array, rank as an int or an array, world_size).

    Values on a device are not read. In the row layout documents may have any lengths. Raises `ValueError` for invalid
    arguments.
    """
    world_size = check_world_size(world_size)
    cu_seqlens = as_cu_seqlens(cu_seqlens, world_size if layout is Layout.DOCUMENT else 1)
    return cu_seqlens, as_rank_argument(rank, world_size), world_size


def as_rank(rank: int | Array) -> jax.Array:
    """Return a checked rank as an array `[1]` int32, which the kernels read; -1 if int32 cannot hold it."""
    if isinstance(rank, int):
        return jnp.full((1,), rank, jnp.int32)
    if isinstance(rank, np.ndarray):  # JAX would drop the upper bits of a large integer
        return as_rank(min(max(int(rank.item()), -1), MAX_OFFSET))
    return _as_int32(rank).reshape(1)


def as_flag(name: str, flag: bool) -> bool:
    """Return `flag` as a Python bool; for a traced flag JAX raises its own error."""
    return bool(flag) if isinstance(flag, Tracer) else check_flag(name, flag)


def dtype_name(name: str, dtype) -> str:
    """Return the name of a dtype in any form that JAX accepts; `ValueError` for anything else."""
    try:
        if isinstance(dtype, str | type | np.dtype):
            return jnp.dtype(dtype).name
    except TypeError:
        pass
    raise ValueError(f"{name}: expected a dtype, got {dtype!r}")


def readable(*arrays: Array) -> bool:
    """Return whether the host can read `arrays` without waiting: NumPy arrays, and JAX arrays on the CPU."""
    return all(map(_is_readable, arrays))


def _is_readable(x: Array) -> bool:
    if isinstance(x, np.ndarray):
        return True
    if isinstance(x, Tracer) or not x.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in x.devices())


def fingerprint(x: jax.Array) -> jax.Array:
    """Return a 64-bit hash of the elements of `x` and their order, as `[2]` int32."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack((x.real, x.imag))
    bits = 8 * min(x.dtype.itemsize, 4)
    elements = jax.lax.bitcast_convert_type(x, f"uint{bits}").ravel().astype(jnp.uint32)
    places = jnp.arange(len(elements), dtype=jnp.uint32)
    seeds = jnp.uint32(1), jnp.uint32(0x9E3779B9)
    sums = [_scrambled(_scrambled(places + seed) ^ elements).sum(dtype=jnp.uint32) for seed in seeds]
    return jax.lax.bitcast_convert_type(jnp.stack(sums), jnp.int32)


def _scrambled(x: jax.Array) -> jax.Array:
    """Return 32-bit numbers in which each bit depends on all bits of `x`."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def mark_padded(cu_seqlens: jax.Array) -> None:
    """Record that some of the tokens that `cu_seqlens` counts are padding, for `is_padded`."""
    _padded[id(cu_seqlens)] = cu_seqlens


def is_padded(cu_seqlens) -> bool:
    """Return whether `cu_seqlens` is an array that `mark_padded` got; copies and traced arrays are not known."""
    return _padded.get(id(cu_seqlens)) is cu_seqlens


def on_host(x: Array, advice: str = "call this outside of jit", name: str = "cu_seqlens") -> list[int]:
    """Return the integers of the argument `name`, read on the host; `ValueError` with `advice` if they are traced."""
    if isinstance(x, list | tuple):
        return check_offsets(x, name)
    check_array(name, x)
    check_cu_seqlens(x.shape, str(x.dtype), name)
    try:
        return check_offsets(np.asarray(x).tolist(), name)
    except jax.errors.TracerArrayConversionError:
        raise ValueError(f"{name}: expected values that can be read here, got a traced array; {advice}") from None
