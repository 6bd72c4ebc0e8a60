"""Helpers for mesh axes: a device's place on an axis, and the axes of an array's type."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AxisName = str | tuple[str, ...]


def axis_names(axis_name: AxisName | None) -> tuple[str, ...]:
    """Return the names of one axis, of several, or of none."""
    return () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def place_on(axis_name: AxisName) -> tuple[jax.Array, int]:
    """Return (rank, world_size) of this shard; `ValueError` outside of a `shard_map` over that axis."""
    try:
        return jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(f"axis_name: expected a mesh axis of the shard_map around this, got {axis_name!r}") from None


def varying_axes(*arrays: jax.Array) -> tuple[str, ...]:
    """Return the mesh axes along which any of `arrays` varies: none outside `shard_map` or with `check_vma=False`."""
    return tuple(sorted(frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))))


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return `x` typed as varying along `axes`.

    Along an axis on which `x` did not vary, the transpose sums the gradient over the ranks.
    """
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def spreading_axes(x: jax.Array, dimensions: int) -> tuple[str, ...]:
    """Return the explicit mesh axes over which the first `dimensions` of `x` are sharded, by its type."""
    names = (name for given in jax.typeof(x).sharding.spec[:dimensions] for name in axis_names(given))
    return tuple(names)


def gather_rows(x: jax.Array, dimensions: int = 1) -> jax.Array:
    """Return `x` with its first dimensions whole on every device; the other dimensions keep their sharding.

    With explicit mesh axes, JAX does not allow indexing of a sharded dimension.
    """
    if not spreading_axes(x, dimensions):
        return x
    sharding = jax.typeof(x).sharding
    return jax.reshard(x, NamedSharding(sharding.mesh, P(*(None,) * dimensions, *sharding.spec[dimensions:])))


def spread_like(x: jax.Array, model: jax.Array, dimensions: tuple[int | None, ...]) -> jax.Array:
    """Return `x` with each dimension sharded like the given dimension of `model`; None means not sharded."""
    spread = [array for array in (model, x) if spreading_axes(array, array.ndim)]
    if not spread:
        return x
    of_model = jax.typeof(model).sharding.spec
    spec = P(*(None if dimension is None else of_model[dimension] for dimension in dimensions))
    return jax.reshard(x, NamedSharding(jax.typeof(spread[0]).sharding.mesh, spec))


def largest_along(axis: int, x: jax.Array) -> jax.Array:
    """Return the largest elements of `x` along an array's axis: NaN if any is NaN, -inf if there are none."""
    # The maximum of NaN and a number may be the number, in XLA on a CPU.
    return jnp.where(jnp.isnan(x).any(axis), jnp.nan, x.max(axis, initial=-jnp.inf))


def largest_on(axis_name: AxisName, x: jax.Array) -> jax.Array:
    """Return the largest value of each element of `x` over the ranks; NaN if it is NaN on any rank.

    The result has no derivative.
    """
    x = jax.lax.stop_gradient(x)
    nan = jnp.isnan(x)  # some collectives drop NaN, so it is transferred apart
    both = jnp.stack((jnp.where(nan, -jnp.inf, x), nan.astype(x.dtype)))
    largest, any_nan = jax.lax.pmax(both, axis_name)
    return jnp.where(any_nan > 0, jnp.nan, largest)
