"""Checks of single arguments that are arrays of JAX or NumPy; `zigzag_kernels.checks` has the rules themselves."""

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.checks import check_cu_seqlens, check_rank, check_world_size

Array = jax.Array | np.ndarray


def check_array(name: str, x) -> None:
    """Raise `ValueError` unless `x` is a JAX or NumPy array; traced arrays are JAX arrays."""
    if not isinstance(x, Array):
        raise ValueError(f"{name}: expected an array of JAX or NumPy, got {type(x).__name__}")


def check_batch(cu_seqlens: Array, rank: int | Array | None, world_size: int) -> None:
    """Raise `ValueError` for shapes, types and host values that no batch has; values on a device are not read."""
    check_world_size(world_size)
    check_array("cu_seqlens", cu_seqlens)
    check_cu_seqlens(cu_seqlens.shape, str(cu_seqlens.dtype))
    if rank is not None:
        check_rank(rank, world_size, isinstance(rank, Array | np.generic))


def as_rank(rank: int | Array) -> jax.Array:
    """Return a rank that `check_batch` accepts as the kernels read it: `[1]` int32."""
    return jnp.asarray(rank, jnp.int32).reshape(1)
