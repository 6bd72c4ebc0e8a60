"""Attention for callers outside `shard_map`: whole arrays, sharded over the axes of a mesh."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from zigzag_kernels.batch_checks import check_form, check_padding_unseen
from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import (
    check_layout,
    check_lengths,
    check_method,
    check_offsets,
    check_sinks,
    check_window_size,
)
from zigzag_kernels.documents import DocumentPlan
from zigzag_kernels.halo import reach_of_mask
from zigzag_kernels.modes import Backend, Layout, Method

from .api import zigzag_attention
from .arguments import Array, as_cu_seqlens, as_flag, as_lengths, check_array, is_padded
from .axes import AxisName, largest_along, largest_on
from .batch import Batch, Form, check_host_rows
from .halos import check_documents, halo_of_batch, reach_options
from .host import ShardedBatch
from .launch import choose_backend
from .plans import Parts, offsets_of, one_part, parts_of_all
from .prepare import prepare_batch
from .specs import Surroundings, check_divided, check_mesh, check_spread, size_on

_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(zigzag_attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "axis_name"
)
_MASK = ("causal", True), ("window_size", NO_WINDOW), ("attention_chunk", 0)
"""The options that say what a row sees, and their defaults."""


class _Axes(NamedTuple):
    """The mesh axes over which dimensions are sharded, under the names of the arguments."""

    axis: AxisName
    head_axis: AxisName | None
    batch_axis: AxisName | None


def make_zigzag_attention(
    mesh: Mesh,
    axis: AxisName = "cp",
    *,
    head_axis: AxisName | None = None,
    batch_axis: AxisName | None = None,
    **options,
) -> Callable[..., jax.Array | tuple[jax.Array, ...]]:
    """Make a function `attention(q, k, v, cu_seqlens=None, *, sinks=None)` of arrays that are sharded over `mesh`.

    The function wraps `zigzag_attention` in `shard_map` with the right specs, and works under `jit` and `grad`.

    Args:
        mesh: the mesh of devices.
        axis: mesh axis, or axes, over which tokens are sharded in zigzag order: the rows of all ranks in the
            order of the ranks (see `shard`).
        head_axis: mesh axis over which heads, and with them `sinks`, are sharded (tensor parallelism).
        batch_axis: mesh axis over which the first dimension of `[batch, ...]` inputs is sharded (data parallelism).
        options: keyword arguments of `zigzag_attention`, the same for all calls. A call may pass `sinks` of its own.

    Returns:
        A function that takes one of

        - q, k, v `[W * T, heads, head_dim]` and `cu_seqlens [N + 1]`, or None for one sequence, or the `Batch` that
          `attention.prepare_batch(cu_seqlens, lengths=None, row_length=None, rows=1, unsharded=None, max_seqlen=None)`
          makes once for all layers, of offsets, of a plan of `plan_documents`, or of a `host.ShardedBatch`;
        - q, k, v `[batch, W * T, heads, head_dim]` and None for sequences of equal length;
        - q, k, v `[batch, W * T, heads, head_dim]` and `cu_seqlens [batch, N + 1]`, one packed row per entry,

        and returns out in the shape of q. If lse or max_logits are requested, it returns a tuple of out and the
        requested results: lse `[heads, W * T]` or `[batch, heads, W * T]` float32, and max_logits `[heads]` float32
        over all rows of the batch. It raises the errors of `zigzag_attention`. Gradients of `sinks [heads]` are summed
        over all devices.

        The function raises an error for an array that is sharded over a mesh axis which no argument names, if it knows
        the sharding: in eager calls, and with explicit axes of `mesh`. Under `jit` with other meshes, XLA gathers such
        arrays.

    Raises:
        ValueError: an axis that `mesh` does not have, or has twice.
        TypeError: an option that `zigzag_attention` does not take.
    """
    axes = _Axes(axis, head_axis, batch_axis)
    check_mesh(mesh, axes._asdict())
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{name}: expected one of the options {', '.join(_OPTIONS)}")
    layout = check_layout(options.get("layout", Layout.DOCUMENT))
    asked = [name for name in ("lse", "max_logits") if as_flag(f"return_{name}", options.get(f"return_{name}", False))]
    sinks_of_all = options.pop("sinks", None)
    shared = _Shared(mesh, axes, layout, options, ("out", *asked))

    def attention(q: Array, k: Array, v: Array, cu_seqlens: Array | Batch | None = None, *, sinks: Array | None = None):
        return shared.attend(q, k, v, cu_seqlens, sinks_of_all if sinks is None else sinks)

    attention.prepare_batch = shared.prepare_batch
    return attention


@dataclass(frozen=True)
class _Shared:
    """Everything that the calls of one attention function share."""

    mesh: Mesh
    axes: _Axes
    layout: Layout
    options: dict[str, Any]  # keyword arguments of `zigzag_attention`, except sinks
    results: tuple[str, ...]  # names of the results that a call returns

    @property
    def ranks(self) -> int:
        """The number of devices that share each sequence."""
        return size_on(self.mesh, self.axes.axis)

    @property
    def cuts(self) -> int:
        """The number of ranks over which each sequence is cut by itself: 1 in the row layout."""
        return 1 if self.layout == Layout.ROW else self.ranks

    def call(self, function: Callable[..., Any], arrays: dict[str, Any], specs: dict[str, Any], out_specs: Any) -> Any:
        """Call `function(**shards)` on each device; `specs` say, by name, how `arrays` are sharded."""
        return Surroundings(self.mesh, given=True).call(function, arrays, specs, out_specs)

    def attend(
        self, q: Array, k: Array, v: Array, cu_seqlens: Array | Batch | None, sinks: Array | None
    ) -> jax.Array | tuple[jax.Array, ...]:
        """Return the results of attention over all devices, as `make_zigzag_attention` describes them."""
        axis, head_axis, batch_axis = self.axes
        _check_arrays(self.mesh, self.axes, q=q, k=k, v=v)
        lead = (batch_axis,) * (q.ndim - 3)
        rows = P(*lead, axis, head_axis)
        arrays: dict[str, Any] = {"q": q, "k": k, "v": v}
        specs: dict[str, Any] = dict.fromkeys(arrays, rows)
        if cu_seqlens is not None:
            arrays["cu_seqlens"], specs["cu_seqlens"] = self.spread_offsets(cu_seqlens, q.shape[: q.ndim - 2])
            self.check_mask(cu_seqlens, q.shape[-3])
        if sinks is not None:
            check_array("sinks", sinks)
            check_sinks(sinks.shape, str(sinks.dtype), q.shape[-2])
            arrays["sinks"], specs["sinks"] = sinks, P(head_axis)
        attend = functools.partial(zigzag_attention, axis_name=axis, **self.options)
        on_shard = functools.partial(_attend_shard, attend, batch_axis, "max_logits" in self.results)
        of_results = {"out": rows, "lse": P(*lead, head_axis, axis), "max_logits": P(head_axis)}
        out_specs = tuple(of_results[name] for name in self.results)
        return self.call(on_shard, arrays, specs, out_specs if len(out_specs) > 1 else rows)

    def check_mask(self, cu_seqlens: Array | Batch, tokens: int) -> None:
        """Raise `ValueError` if the host knows that the mask does not fit the documents, in rows of `tokens` tokens.

        The checks are here, because inside `shard_map` all offsets are traced.
        """
        causal, window_size, chunk = (self.options.get(name, default) for name, default in _MASK)
        ends_with_row = causal or check_window_size(window_size)[1] == 0
        if isinstance(cu_seqlens, Batch):
            check_padding_unseen(cu_seqlens.padded, ends_with_row, cu_seqlens.lengths is not None)
            return
        check_padding_unseen(is_padded(cu_seqlens), ends_with_row, False)
        if self.options.get("method") != Method.HALO or self.ranks == 1 or isinstance(cu_seqlens, jax.Array):
            return
        reach = reach_of_mask(causal, window_size, chunk, 0)
        for offsets in cu_seqlens if np.ndim(cu_seqlens) == 2 else [cu_seqlens]:
            if reach is not None:
                check_documents(offsets, self.ranks, tokens if self.layout == Layout.ROW else None, reach)

    def spread_offsets(self, cu_seqlens: Array | Batch, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Return (cu_seqlens as an array or a batch, its spec); `shape` is (batch, tokens) of q, or (tokens,).

        Raises `ValueError` for offsets on the host that do not describe these tokens.
        """
        *batch, tokens = shape
        if isinstance(cu_seqlens, Batch):
            rows_of_all = self.layout == Layout.ROW and self.axes.batch_axis is None
            if (batch and not rows_of_all) or cu_seqlens.compared_by != self.axes.axis:
                raise ValueError(
                    "cu_seqlens: expected, for packed q [tokens, heads, head_dim], a batch of attention.prepare_batch, "
                    f"got one prepared for axis_name {cu_seqlens.compared_by!r}"
                )
            return cu_seqlens, _batch_specs(cu_seqlens, self.axes.axis)
        if not batch:
            return as_cu_seqlens(cu_seqlens, self.cuts, tokens), P()
        check_array("cu_seqlens", cu_seqlens)
        if cu_seqlens.ndim != 2 or cu_seqlens.shape[0] != batch[0]:
            expected = f"[batch, N + 1] with batch {batch[0]} as in q"
            raise ValueError(f"cu_seqlens: expected {expected}, got {cu_seqlens.shape}")
        if isinstance(cu_seqlens, np.ndarray):
            for offsets in cu_seqlens:
                check_lengths(check_offsets(offsets.tolist()), self.cuts, tokens)
        return cu_seqlens, P(self.axes.batch_axis)

    def prepare_batch(
        self,
        cu_seqlens: Array | DocumentPlan | ShardedBatch | Parts,
        lengths: Array | None = None,
        row_length: int | None = None,
        rows: int = 1,
        unsharded: Array | None = None,
        max_seqlen: int | None = None,
    ) -> Batch:
        """Prepare a batch for all layers: `attention` takes it in place of `cu_seqlens [N + 1]`."""
        parts, tokens, padded = None, 0, is_padded(cu_seqlens)
        if isinstance(cu_seqlens, ShardedBatch):
            unsharded = cu_seqlens.fingerprint if unsharded is None else unsharded
            cu_seqlens, row_length = offsets_of(cu_seqlens, self.ranks, self.layout)
        if isinstance(cu_seqlens, DocumentPlan | Parts):
            if lengths is not None:
                raise ValueError("lengths: expected None with a plan, got an array")
            of_all = parts_of_all(cu_seqlens, self.ranks, self.layout)
            cu_seqlens, lengths, parts = one_part(of_all, self.ranks)
            tokens = of_all.tokens
        form = Form(*check_form(self.layout, row_length, rows, self.ranks))
        if parts is not None:
            form = form._replace(whole_tokens=parts.whole_tokens, tokens=tokens)
        window_size, chunk = (self.options.get(name, default) for name, default in _MASK[1:])
        reach = reach_options(window_size, chunk, max_seqlen)
        packed, documents = (form.row_length, form.rows), (cu_seqlens, lengths)
        method = self.options.get("method")
        if method is not None:
            check_method(method)
        method, *limits = halo_of_batch(method, tuple(reach.values()), documents, packed, self.ranks)
        arrays = {"cu_seqlens": as_cu_seqlens(cu_seqlens, self.cuts)}
        check_host_rows(cu_seqlens, form, self.ranks)
        if lengths is not None and (real := as_lengths(lengths, cu_seqlens)).size:
            arrays["lengths"] = real
        if unsharded is not None:
            check_array("unsharded", unsharded)
            arrays["unsharded"] = jnp.asarray(unsharded)
        specs = dict.fromkeys(arrays, P())
        if parts is not None:
            arrays["whole_cu_seqlens"] = jnp.asarray(parts.whole_cu_seqlens)
            specs["whole_cu_seqlens"] = P(self.axes.axis)
        chosen = {name: self.options[name] for name in ("backend", "layout") if name in self.options} | reach
        row_length = None if row_length is None else form.row_length
        chosen |= {"axis_name": self.axes.axis, "method": method, "row_length": row_length, "rows": form.rows}
        prepare = _Prepare(tuple(chosen.items()), None if parts is None else (parts.whole_tokens, parts.tokens))
        around = Surroundings(self.mesh, given=True)
        out_specs = self.specs_of_batch(method, limits, form, specs)
        batch = around.call(prepare, arrays, specs, out_specs, compiled=True)
        return dataclasses.replace(batch, tokens=tokens, padded=padded)

    def specs_of_batch(self, method: str, limits: list[int], form: Form, specs: dict[str, P]) -> Batch:
        """Return the specs of a batch of all ranks; `limits` are (rows of a halo, promised longest length).

        `specs` are the specs of the arrays that the batch is made of.
        """
        axis = self.axes.axis
        tables = None if choose_backend(self.options.get("backend")) == Backend.REFERENCE else P(axis)
        fields = {name: specs.get(name) for name in ("lengths", "whole_cu_seqlens")} | form._asdict()
        fields |= dict(zip(("halo", "max_seqlen"), limits, strict=True))
        return Batch(P(), P(axis), self.ranks, method, tables, tables, axis, **fields)  # pyright: ignore


@dataclass(frozen=True)
class _Prepare:
    """Prepares the batch of one device from its shards of the arrays; equal objects prepare equal batches.

    `options` are keyword arguments of `prepare_batch`; `of_plan` is (whole tokens, tokens) of a plan, or None.
    """

    options: tuple[tuple[str, Any], ...]
    of_plan: tuple[int, int] | None

    def __call__(self, **shard: jax.Array) -> Batch:
        if self.of_plan is None:
            return prepare_batch(**shard, **dict(self.options))
        whole, split = (shard.pop(name) for name in ("whole_cu_seqlens", "cu_seqlens"))
        real = shard.pop("lengths", jnp.zeros(0, jnp.int32))  # missing if the plan has no split documents
        return prepare_batch(Parts(whole, split, real, *self.of_plan), **shard, **dict(self.options))


def _attend_shard(attend: Callable[..., Any], batch_axis: AxisName | None, return_max_logits: bool, **shard):
    """Call `attend` on one device's `shard` of the arguments, given by name, and return its results."""
    q, k, v, cu_seqlens = (shard.get(name) for name in ("q", "k", "v", "cu_seqlens"))
    attend = functools.partial(attend, sinks=shard.get("sinks"))
    packed_apart = shard["q"].ndim == 4 and cu_seqlens is not None and not isinstance(cu_seqlens, Batch)
    results = (jax.vmap(attend) if packed_apart else attend)(*(x for x in (q, k, v, cu_seqlens) if x is not None))
    if not return_max_logits:
        return results
    *others, largest = results
    if packed_apart:
        largest = largest_along(0, largest)
    return *others, largest if batch_axis is None else largest_on(batch_axis, largest)


def _batch_specs(batch: Batch, axis: AxisName) -> Batch:
    """Return the specs of a batch of all ranks."""
    of_ranks = "segments", "sequences", "whole_cu_seqlens"
    tables = {name: None if getattr(batch, name) is None else P(axis) for name in of_ranks}
    lengths = None if batch.lengths is None else P()
    return dataclasses.replace(batch, cu_seqlens=P(), rank=P(axis), lengths=lengths, **tables)  # pyright: ignore


def _check_arrays(mesh: Mesh, axes: _Axes, **arrays) -> None:
    """Raise `ValueError` for arrays that the axes do not divide, or that are sharded over other axes."""
    for name, x in arrays.items():
        check_array(name, x)
    for name, x in arrays.items():
        if axes.batch_axis is not None and x.ndim != 4:
            raise ValueError(
                f"{name}: expected [batch, tokens, heads, head_dim] to spread over batch_axis, got {x.shape}"
            )
        if x.ndim not in (3, 4):
            raise ValueError(f"{name}: expected [tokens, heads, head_dim] or [batch, ...], got shape {x.shape}")
        spread = {"head_axis": (-2, "heads"), "axis": (-3, "tokens"), "batch_axis": (-4, "batch")}
        for argument, (dimension, what) in spread.items():
            given = getattr(axes, argument)
            check_divided(name, x, dimension, what, (argument, given, size_on(mesh, given)))
        check_spread(name, x, axes._asdict())
