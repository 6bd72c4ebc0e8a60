"""The floating-point operations of the operators, for `torch.utils.flop_counter`.

That module imports triton, which this package must not import before the first kernel. Therefore the formulas are
registered when other code imports the module.
"""

import importlib.abc
import importlib.util
import math
import sys
from types import ModuleType

import torch

from zigzag_kernels.callspec import CallSpec
from zigzag_kernels.cost.counts import Mask, backward_flops, forward_flops, visible_scores
from zigzag_kernels.problem import table_shapes
from zigzag_kernels.segments.columns import SegmentColumn

from . import autograd as autograd  # defines the operators

MODULE = "torch.utils.flop_counter"


def _forward(q, k, v, segments, sequences, call, world_size, *_, out_val=None) -> int:
    return forward_flops(_scores(q, k, segments, call, world_size), *q.shape[1:])


def _backward(q, k, v, out, lse, dout, dlse, segments, sequences, call, world_size, *_, out_val=None) -> int:  # noqa: PLR0917  (arguments of the operator)
    return backward_flops(_scores(q, k, segments, call, world_size), *q.shape[1:])


def _scores(q: torch.Tensor, k: torch.Tensor, segments: torch.Tensor, call: str, world_size: int) -> int:
    """Return the number of unmasked scores of one query head; the host waits for the table `segments`.

    Tensors without values count as one sequence, which has the most scores of all batches of that shape.
    """
    spec = CallSpec.from_key(call)
    mask = Mask(spec.causal, spec.window_size, spec.attention_chunk)
    if type(segments) is not torch.Tensor or segments.is_meta:
        keys = max(k.shape[0], world_size * q.shape[0])
        return visible_scores(0, keys, keys, mask) // (keys // q.shape[0] if len(q) else 1)
    rows = _tables_of_rows(spec, segments, world_size)[:, _COLUMNS].tolist()
    return sum(visible_scores(position, tokens, length, mask) for position, tokens, length in rows)


def _tables_of_rows(spec: CallSpec, segments: torch.Tensor, world_size: int) -> torch.Tensor:
    """Return table entries that together have every row once; padding entries see no key.

    For a ring the entries of one table suffice, because it has the whole document's positions. With halos the rows are
    in two tables.
    """
    whole = 2 * spec.whole_documents + 1 if spec.whole_tokens else 0
    shape, _ = table_shapes(spec.method.kv_layout, 0, world_size)
    tables = math.prod(shape[:-2]) if whole or segments.ndim == 3 else 1
    entries = segments.flatten(0, -2)
    return entries[: whole + (len(entries) - whole) // tables * (2 if spec.halo else 1)]


_COLUMNS = [SegmentColumn.FIRST_POSITION, SegmentColumn.Q_LEN, SegmentColumn.REAL]


def _register(flop_counter: ModuleType) -> None:
    operators = torch.ops.zigzag
    forward, backward = (
        flop_counter.register_flop_formula(x, get_raw=True)
        for x in (
            [operators.attention_forward, operators.parallel_forward],
            [operators.attention_backward, operators.parallel_backward],
        )
    )
    forward(_forward)
    backward(_backward)


class _OnceImported(importlib.abc.MetaPathFinder):
    """An import hook that registers the formulas when the module is imported, and then removes itself."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module
        return spec


if MODULE in sys.modules:
    _register(sys.modules[MODULE])
else:
    sys.meta_path.insert(0, _OnceImported())
