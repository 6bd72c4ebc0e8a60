"""Attention functions for the layers of Flax: `linen_attention` and `nnx_attention`.

The functions have Flax's own argument names, and raise errors for options that `segmented_attention` does not support.
This module does not import Flax.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .arguments import Array, check_array
from .segmented import segmented_attention
from .segmented_batch import SegmentedBatch
from .surroundings import under_own_promotion

_NOT_OPTIONS = {"q", "k", "v", "segment_ids", "positions", "max_segments", "causal", "return_lse"}
_OPTIONS = tuple(name for name in inspect.signature(segmented_attention).parameters if name not in _NOT_OPTIONS)


def linen_attention(*, causal: bool, **options: Any) -> Callable[..., jax.Array]:
    """Make the `attention_fn` of `flax.linen.MultiHeadDotProductAttention`.

    Args:
        causal: whether a token attends only to itself and to the tokens before it. Linen's layer has no such argument.
        options: keyword arguments of `segmented_attention`, such as `mesh`, `axis`, `batch_axis` and `window_size`.

    Returns:
        A function with the arguments of `flax.linen.dot_product_attention`: query, key and value are
        `[batch..., S, heads, head_dim]`, in zigzag order if several devices share a row. `mask` is None, or the
        `SegmentedBatch` of `prepare_segments`, which the layer hands on: `layer(x, mask=batch)`. Products of float32
        are IEEE products and the softmax is float32, whatever `precision` and `force_fp32_for_softmax` say.

        It raises `ValueError` for a mask that is an array, for `bias`, for dropout unless `deterministic`, for
        `sow_weights` and for products of the caller's own (`qk_attn_weights_einsum` and its siblings), and the errors
        of `segmented_attention`.

    Raises:
        TypeError: an option that `segmented_attention` does not take.
    """
    _check_options(options)

    def attention_fn(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: SegmentedBatch | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Array] | None = None,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
    ) -> jax.Array:
        refused = {"bias": bias, "einsum_dot_general": einsum_dot_general}
        refused |= {"qk_attn_weights_einsum": qk_attn_weights_einsum}
        refused |= {"attn_weights_value_einsum": attn_weights_value_einsum}
        _refuse(refused, mask, module, 0.0 if deterministic else dropout_rate)
        query, key, value = _promoted(dtype, query, key, value)
        return _attend(query, key, value, mask, causal=causal, **options)

    return attention_fn


def nnx_attention(**options: Any) -> Callable[..., jax.Array]:
    """Make the `attention_fn` of `flax.nnx.MultiHeadAttention`.

    Args:
        options: keyword arguments of `segmented_attention`, such as `mesh`, `axis`, `batch_axis` and `window_size`.

    Returns:
        A function with the arguments of `flax.nnx.dot_product_attention`, otherwise like the result of
        `linen_attention`. Each call of the layer says whether attention is causal:
        `layer(x, mask=batch, is_causal=True)`. There may be fewer KV heads than query heads.

    Raises:
        TypeError: an option that `segmented_attention` does not take.
    """
    _check_options(options)

    def attention_fn(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: SegmentedBatch | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        _refuse({"bias": bias}, mask, module, 0.0 if deterministic else dropout_rate)
        if promote_dtype is None:
            query, key, value = _promoted(dtype, query, key, value)
        else:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        return _attend(query, key, value, mask, causal=is_causal, **options)

    return attention_fn


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{name}: expected one of the options {', '.join(_OPTIONS)}")


def _refuse(absent: dict[str, Any], mask: Any, module: Any, dropout_rate: float) -> None:
    """Raise `ValueError` for options of a layer that the kernels do not support."""
    for name, given in absent.items():
        if given is not None:
            raise ValueError(f"{name}: expected None, which is all that this attention computes, got {given!r}")
    if mask is not None and not isinstance(mask, SegmentedBatch):
        raise ValueError(
            "mask: expected None or the SegmentedBatch of prepare_segments, as documents and padding are given by "
            f"segment ids, and causal masks and windows by arguments, got {type(mask).__name__}"
        )
    if module is not None:
        raise ValueError("sow_weights: expected False, as no attention weights are kept that could be sown, got True")
    if dropout_rate:
        raise ValueError(
            f"dropout_rate: expected 0, or deterministic=True, as attention has no dropout, got {dropout_rate}"
        )


@under_own_promotion
def _promoted(dtype: Any, query: Array, key: Array, value: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the arrays in `dtype`; None means the dtype that all of them promote to."""
    for name, x in {"query": query, "key": key, "value": value}.items():
        check_array(name, x)
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    return jnp.asarray(query, dtype), jnp.asarray(key, dtype), jnp.asarray(value, dtype)


def _attend(query: Array, key: Array, value: Array, batch: SegmentedBatch | None, **options) -> jax.Array:
    """Return `segmented_attention` of arrays `[batch..., S, heads, head_dim]`, which may have no batch dimension."""
    shape = query.shape
    if len(shape) != 4 and len(shape) >= 3:
        query, key, value = (x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (query, key, value))
    out: Any = segmented_attention(query, key, value, batch, **options)
    return out.reshape(shape)
