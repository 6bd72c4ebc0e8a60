"""Functions for mesh axes that a caller names: they find the mesh, check arrays, and call functions on shards."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .arguments import Array
from .axes import AxisName, axis_names


@dataclass(frozen=True)
class Surroundings:
    """The mesh of a call, and whether the call is inside a `shard_map` over it.

    Attributes:
        mesh: the mesh, or None for a single device without a mesh.
        inside: True if the arrays of the call are shards of one device, inside a `shard_map`.
        given: True if the caller passed `mesh`; otherwise it comes from `jax.set_mesh` or the `shard_map`.
    """

    mesh: Mesh | AbstractMesh | None
    inside: bool = False
    given: bool = False

    def size(self, axes: AxisName | None) -> int:
        """Return the number of devices along `axes`."""
        return 1 if self.mesh is None else size_on(self.mesh, axes)

    def parts(self, axes: AxisName | None) -> int:
        """Return the number of parts into which `call` cuts a dimension that is sharded over `axes`."""
        return 1 if self.inside else self.size(axes)

    def call(
        self,
        function: Callable[..., Any],
        arrays: dict[str, Any],
        specs: dict[str, Any],
        out_specs: Any,
        *,
        compiled: bool = False,
    ) -> Any:
        """Call `function(**shards)` on each device; `specs` say, by name, how `arrays` are sharded.

        With `compiled` the call is one compiled program outside `jit` too, which equal later calls reuse. `shard_map`
        alone would compile and start each operation by itself. `function` and all specs are then hashable, and equal
        functions compute the same.
        """
        if self.mesh is None or self.inside:
            return function(**arrays)
        compiled = compiled and not self.without_devices(arrays)  # otherwise JAX says so, if this is not inside `jit`
        if AxisType.Explicit in self.mesh.axis_types:
            arrays = reshard(arrays, specs, self.mesh)
        of_arrays = {name: specs[name] for name in arrays}
        if compiled:
            mapped = _compiled(self, function, tuple(of_arrays.items()), out_specs)
        else:
            mapped = self.on_shards(function, of_arrays, out_specs)
        return mapped(*arrays.values())

    def without_devices(self, arrays: dict[str, Any]) -> bool:
        """Return whether neither the mesh, nor `jax.set_mesh`, nor one of `arrays` is known to name devices."""
        if not isinstance(self.mesh, AbstractMesh) or not jax.sharding.get_abstract_mesh().empty:
            return False
        return not any(isinstance(x, Tracer) or isinstance(x.sharding, NamedSharding) for x in arrays.values())

    def on_shards(self, function: Callable[..., Any], specs: dict[str, Any], out_specs: Any) -> Callable[..., Any]:
        """Return `function` as a function of whole arrays, in the order of `specs`."""

        def of_shards(*shards):
            return function(**dict(zip(specs, shards, strict=True)))

        mesh = self.mesh if self.given else None
        return jax.shard_map(of_shards, mesh=mesh, in_specs=tuple(specs.values()), out_specs=out_specs)


@functools.lru_cache(maxsize=64)
def _compiled(
    around: Surroundings, function: Callable[..., Any], specs: tuple[tuple[str, Any], ...], out_specs: Any
) -> Callable[..., Any]:
    return jax.jit(around.on_shards(function, dict(specs), out_specs))


def surroundings_of(mesh: Mesh | AbstractMesh | None, axes: Mapping[str, AxisName | None]) -> Surroundings:
    """Return the `Surroundings` of a call; without a `mesh` it uses `jax.set_mesh` or the `shard_map` around it.

    `axes` are the axes that the caller named, by argument; the first is required, and the others may be None. Raises
    `ValueError` unless the mesh has each of them once, and inside a `shard_map` over only some axes of its mesh.
    """
    around = jax.sharding.get_abstract_mesh()
    inside = bool(around.manual_axes)
    if inside and mesh is not None and dict(mesh.shape) != dict(around.shape):
        raise ValueError(
            f"mesh: expected None or the mesh of the shard_map around this call, {dict(around.shape)}, "
            f"got {dict(mesh.shape)}"
        )
    if inside and len(around.manual_axes) < len(around.axis_names):
        raise ValueError(
            "axis_names: expected a shard_map over all axes of its mesh around this call, or none, got one over "
            f"{around.manual_axes} of {around.axis_names}: JAX cannot differentiate one shard_map inside another"
        )
    given = mesh is not None and not inside
    if not given:
        mesh = None if around.empty else around
    if mesh is not None:
        check_mesh(mesh, axes)
    for argument, names in list(axes.items())[1:] if mesh is None else ():
        if names:
            raise ValueError(f"mesh: expected one with the {argument} {names!r}, or jax.set_mesh around, got None")
    return Surroundings(mesh, inside, given)


def check_mesh(mesh: Mesh | AbstractMesh, axes: Mapping[str, AxisName | None]) -> None:
    """Raise `ValueError` unless `mesh` has all of `axes`, and no axis is named by two arguments."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    seen = {}
    for argument, given in axes.items():
        names = (given,) if isinstance(given, str) else given
        if argument == "axis" and (names is None or (isinstance(names, tuple) and not names)):
            raise ValueError(f"axis: expected a mesh axis, or several, got {given!r}")
        if names is not None and not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{argument}: expected the name of a mesh axis, or a tuple of names, got {given!r}")
        for name in names or ():
            if name not in mesh.axis_names:
                raise ValueError(f"mesh: expected an axis {name!r}, got the axes {mesh.axis_names}")
            if name in seen:
                raise ValueError(f"{argument}: expected an axis other than {name!r}, which {seen[name]} is already")
            seen[name] = argument


def size_on(mesh: Mesh | AbstractMesh, axes: AxisName | None) -> int:
    """Return the number of devices of `mesh` along `axes`."""
    return math.prod(mesh.shape[name] for name in axis_names(axes))


def check_divided(name: str, x: Array, dimension: int, what: str, over: tuple[str, AxisName | None, int]) -> None:
    """Raise `ValueError` unless the devices along the axes `over` divide a `dimension` of the array.

    `what` names the dimension in the error. `over` is (argument that names the axes, the axes, number of devices).
    """
    argument, axes, size = over
    if axes is not None and x.shape[dimension] % size:
        raise ValueError(
            f"{name}: expected {what} that the {size} devices of {argument} {axes!r} divide, "
            f"got {x.shape[dimension]} in shape {x.shape}"
        )


def check_spread(name: str, x: Array, axes: Mapping[str, AxisName | None]) -> None:
    """Raise `ValueError` for an array that is known to be sharded over an axis which no argument names."""
    sharding = getattr(jax.typeof(x), "sharding", None) if isinstance(x, Tracer) else getattr(x, "sharding", None)
    spec = getattr(sharding, "spec", None) or ()
    named = {axis for given in axes.values() for axis in axis_names(given)}
    for dimension, given in enumerate(spec):
        for axis in axis_names(given if isinstance(given, str | tuple) else None):
            if axis not in named:
                *first, last = axes
                raise ValueError(
                    f"{name}: expected an array that is spread over {sorted(named)}, got one whose dimension "
                    f"{dimension} is spread over {axis!r} too, and would be gathered: name it as {', '.join(first)} or "
                    f"{last}"
                )


def reshard(arrays: dict[str, Any], specs: dict[str, Any], mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Return `arrays`, which may be pytrees, sharded over `mesh` by the `specs` of the same names."""
    placed = {}
    for name, x in arrays.items():
        spread = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs[name], is_leaf=lambda x: isinstance(x, P))
        placed[name] = jax.tree.map(jax.reshard, x, spread)
    return placed
