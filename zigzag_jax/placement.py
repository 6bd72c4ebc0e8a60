"""A marker in a program that raises an error, at lowering, for devices on which attention would be wrong.

Only at lowering does JAX know the platform of a program, its number of devices, and which mesh axes are automatic.
"""

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from zigzag_kernels.modes import Backend

from .axes import spreading_axes

_PLATFORM = {Backend.TRITON: "cuda", Backend.INTERPRET: "cpu"}
_mark = Primitive("zigzag_placement")


def mark(x: jax.Array, backend: str, by_default: bool) -> jax.Array:
    """Return the integers `x`, marked as inputs of attention with `backend`.

    `by_default` says that the caller named no backend. Lowering the program raises `RuntimeError` for a platform on
    which `backend` does not run, and `ValueError` if XLA would make each of several devices compute everything.
    """
    return _mark.bind(x, backend=backend, by_default=by_default)


def check_one_device(backend: str, **arrays: jax.Array | None) -> None:
    """Raise `ValueError` for arrays outside `shard_map` that are known to be sharded over several devices.

    The sharding is known in eager calls, and of traced arrays with explicit mesh axes. The dense reference accepts
    sharded arrays, except rows that are sharded over explicit axes, for which JAX has no product.
    """
    for name, x in arrays.items():
        if x is None:
            continue
        if backend != Backend.REFERENCE and not isinstance(x, Tracer) and len(x.sharding.device_set) > 1:
            raise ValueError(_of_many(name, len(x.sharding.device_set)))
        if spread := spreading_axes(x, 1):
            raise ValueError(
                f"{name}: expected rows that no mesh axis spreads, or a call inside shard_map, got rows spread over "
                f"{spread}: make_zigzag_attention makes a function of arrays that are spread over a mesh"
            )


def _of_many(name: str, devices: int) -> str:
    return (
        f"{name}: expected arrays of one device, or a call inside shard_map, got {devices} devices, each of which "
        "would do all of the work: make_zigzag_attention makes a function of arrays that are spread over a mesh"
    )


def _lower(context, x, *, backend: str, by_default: bool):
    module = context.module_context
    _check_platforms(module.platforms, backend, by_default)
    if backend != Backend.REFERENCE:
        _check_devices(module.axis_context)
    return [x]


def _check_platforms(platforms: tuple[str, ...], backend: str, by_default: bool) -> None:
    for platform in platforms:
        if backend == Backend.REFERENCE and by_default and platform == "cuda":
            raise RuntimeError(
                "backend: expected lower_for(target) around this, or a machine with a GPU, to lower the kernels for "
                "cuda, as None is 'reference' on this one; name backend='reference' to lower dense attention"
            )
        if platform != _PLATFORM.get(Backend(backend), platform):
            raise RuntimeError(
                f"backend: {backend!r} runs on {_PLATFORM[Backend(backend)]}, got a program for {platform}"
            )


def _check_devices(axes) -> None:
    if (devices := getattr(axes, "num_devices", None) or 1) > 1:
        raise ValueError(_of_many("q", devices))
    mesh = getattr(axes, "mesh", None)
    automatic = () if mesh is None else [a for a in mesh.axis_names if a not in axes.manual_axes and mesh.shape[a] > 1]
    if automatic:
        raise ValueError(
            f"axis_names: expected a shard_map over all axes of its mesh, got the automatic axes {automatic}: arrays "
            "that are spread along them would be gathered, and every device along them would do the same work"
        )


_mark.def_impl(lambda x, **_: x)
_mark.def_abstract_eval(lambda x, **_: x)
batching.primitive_batchers[_mark] = lambda arrays, dims, **options: (_mark.bind(*arrays, **options), dims[0])
mlir.register_lowering(_mark, _lower)
