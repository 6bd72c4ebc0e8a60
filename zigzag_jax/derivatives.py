"""Markers that refuse the derivatives that no backend computes, in the words of both front ends.

JAX has no word for "reverse mode only": a `custom_vjp` fails in forward mode, by an error of JAX that depends on where
the transform stands. Arrays pass through these markers before it, and come out as they are.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from zigzag_kernels.derivatives import UNSUPPORTED_DERIVATIVE


def _refuse(*_, **__):
    raise NotImplementedError(UNSUPPORTED_DERIVATIVE)


@jax.custom_jvp
def reverse_mode_only(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return `arrays`; whoever evaluates their tangents, rather than transposing them, gets `NotImplementedError`."""
    return arrays


@reverse_mode_only.defjvp
def _(primals, tangents):
    return *primals, tuple(_tangents.bind(*tangents[0]))


_tangents = Primitive("zigzag_tangents")
"""The identity of tangents, which reverse mode transposes, and nobody may evaluate."""
_tangents.multiple_results = True
_tangents.def_impl(_refuse)
_tangents.def_abstract_eval(lambda *tangents: tangents)
mlir.register_lowering(_tangents, _refuse)
ad.primitive_jvps[_tangents] = lambda primals, tangents: _refuse()
ad.primitive_transposes[_tangents] = lambda cotangents, *tangents: cotangents
batching.primitive_batchers[_tangents] = lambda tangents, dims: (_tangents.bind(*tangents), dims)


@jax.custom_jvp
def without_derivative(arrays):
    """Return the pytree `arrays`; differentiating what is computed of them raises `NotImplementedError`."""
    return arrays


without_derivative.defjvp(_refuse)
