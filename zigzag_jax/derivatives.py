"""Markers that raise the same error for unsupported derivatives as the PyTorch front end.

JAX cannot declare a function as "reverse mode only": in forward mode a `custom_vjp` fails with various errors of JAX,
depending on the transform. Therefore arrays first pass through these markers, which return them unchanged.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from zigzag_kernels.derivatives import UNSUPPORTED_DERIVATIVE


def _refuse(*_, **__):
    raise NotImplementedError(UNSUPPORTED_DERIVATIVE)


@jax.custom_jvp
def reverse_mode_only(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return `arrays`; evaluating their tangents, instead of transposing them, raises `NotImplementedError`."""
    return arrays


@reverse_mode_only.defjvp
def _(primals, tangents):
    return *primals, tuple(_tangents.bind(*tangents[0]))


_tangents = Primitive("zigzag_tangents")
"""The identity of tangents: reverse mode transposes it, and evaluating it raises an error."""
_tangents.multiple_results = True
_tangents.def_impl(_refuse)
_tangents.def_abstract_eval(lambda *tangents: tangents)
mlir.register_lowering(_tangents, _refuse)
ad.primitive_jvps[_tangents] = lambda primals, tangents: _refuse()
ad.primitive_transposes[_tangents] = lambda cotangents, *tangents: cotangents
batching.primitive_batchers[_tangents] = lambda tangents, dims: (_tangents.bind(*tangents), dims)


@jax.custom_jvp
def without_derivative(arrays):
    """Return the pytree `arrays`; differentiating a function of the result raises `NotImplementedError`."""
    return arrays


without_derivative.defjvp(_refuse)
