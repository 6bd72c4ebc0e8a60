"""The floating point operations of the operators, for `torch.utils.flop_counter`.

That module imports triton, and this package may not do so before a kernel is asked for: formulas are registered once
somebody else has imported the module.
"""

import importlib.abc
import importlib.util
import sys
from types import ModuleType

import torch

from zigzag_kernels.callspec import CallSpec
from zigzag_kernels.cost.counts import backward_flops, forward_flops
from zigzag_kernels.segments.columns import SegmentColumn

from . import autograd as autograd  # defines the operators

MODULE = "torch.utils.flop_counter"


def _forward(q, k, v, segments, sequences, call, world_size, *_, out_val=None) -> int:
    return forward_flops(_scores(q, k, segments, call, world_size), *q.shape[1:])


def _backward(q, k, v, out, lse, dout, dlse, segments, sequences, call, world_size, *_, out_val=None) -> int:  # noqa: PLR0917  (arguments of the operator)
    return backward_flops(_scores(q, k, segments, call, world_size), *q.shape[1:])


def _scores(q: torch.Tensor, k: torch.Tensor, segments: torch.Tensor, call: str, world_size: int) -> int:
    """Return the unmasked scores of one query head; the host waits for the table of `segments`.

    Tensors without values count as one sequence, which is the most that a batch of their shape can be.
    """
    causal = CallSpec.from_key(call).causal
    if type(segments) is not torch.Tensor or segments.is_meta:
        keys = max(k.shape[0], world_size * q.shape[0])
        return q.shape[0] * (keys + 1) // 2 if causal else q.shape[0] * keys
    columns = segments[..., :-1, :].long()  # the last entry is the padding
    rows, keys = columns[..., SegmentColumn.Q_LEN], columns[..., SegmentColumn.KEYS]
    if not causal:
        return int((rows * keys).sum())
    position, keys = columns[..., SegmentColumn.POSITION], columns[..., SegmentColumn.KV_LEN]
    return int((_seen_up_to(position + rows, keys) - _seen_up_to(position, keys)).sum())


def _seen_up_to(position: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the scores of all rows before `position`, of which row i sees the first i + 1 of `keys`, if there are."""
    rows = position.clamp(min=0)
    all_seen = torch.minimum(rows, keys)
    return all_seen * (all_seen + 1) // 2 + (rows - all_seen) * keys


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
    """Registers the formulas as soon as the module is imported, and is then gone."""

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
