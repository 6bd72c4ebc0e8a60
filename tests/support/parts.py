"""One rank's attention in parts, computed by the plan alone: windows of heads, ring steps, all layouts of keys."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import zigzag_jax.launch
import zigzag_torch.launch
from tests.support.cases import RESULTS
from tests.support.machine import GPU
from tests.support.processes import torch_numpy
from tests.support.rank import gathered_rows, rank_arrays, rank_rows
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.plan import Part
from zigzag_kernels.problem import ArraySpec, make_problem


@dataclass
class Framework:
    """The functions by which a test makes arrays, launches kernels and reads results."""

    array: Any
    run: Any

    @staticmethod
    def numpy(x):
        return torch_numpy(x) if isinstance(x, torch.Tensor) else np.asarray(x)


def torch_array(x, dtype):
    return torch.tensor(x, dtype=getattr(torch, dtype), device="cuda" if GPU else "cpu")


FRAMEWORKS = {
    "torch": Framework(torch_array, lambda *x: zigzag_torch.launch.run(*x)),
    "jax": Framework(lambda x, dtype: jnp.asarray(x, dtype), zigzag_jax.launch.run),
}
TARGET = ".".join(map(str, torch.cuda.get_device_capability())) if GPU else "interpret"


class Rank:
    """One rank of a case in one framework: its arrays, and the attention to K/V in any layout."""

    def __init__(self, case, inputs, rank, framework, *, gluon=False):
        self.case, self.inputs, self.rank, self.framework, self.gluon = case, inputs, rank, framework, gluon
        arrays = rank_arrays(case, inputs, rank)
        self.q, self.dout = (framework.array(x, case.dtype) for x in (arrays.q, arrays.dout))
        self.dlse = framework.array(arrays.dlse, "float32")
        self.strides = (case.heads * case.head_dim, case.head_dim)

    def keys(self, rows, heads=slice(None)):
        return [self.framework.array(self.inputs[name][rows, heads], self.case.dtype) for name in ("k", "v")]

    def problem(self, kv_layout, k):
        case = self.case
        kv = ArraySpec(tuple(k.shape), case.dtype, (k.shape[1] * case.head_dim, case.head_dim))
        return make_problem(
            ArraySpec(tuple(self.q.shape), case.dtype, self.strides), kv, kv,
            make_call_spec(
                head_dim=case.head_dim, backend="interpret", causal=case.causal, softmax_scale=case.softmax_scale
            ),
            sequences=len(case.lengths), world_size=case.world_size, target=TARGET, kv_layout=kv_layout,
            kv_heads=case.kv_heads, gluon=self.gluon,
        )  # fmt: skip

    def tables(self, kv_layout):
        case, array = self.case, self.framework.array
        return plan.segment_tables(
            self.framework.run, array(case.cu_seqlens, "int32"), array([self.rank], "int32"),
            sequences=len(case.lengths), world_size=case.world_size, target=TARGET, kv_layout=kv_layout,
        )  # fmt: skip

    def whole(self, kv_layout, rows):
        """RESULTS of one launch each, keys at the global `rows`."""
        k, v = self.keys(rows)
        problem, (segments, sequences) = self.problem(kv_layout, k), self.tables(kv_layout)
        out, lse = plan.forward(self.framework.run, problem, self.q, k, v, segments)
        gradients = plan.backward(
            self.framework.run, problem, self.q, k, v, out, lse, self.dout, dlse=self.dlse, segments=segments,
            sequences=sequences, dout_strides=self.strides,
        )  # fmt: skip
        return self.named(out, lse, *gradients)

    def windows(self, rows):
        """The same, of gathered keys, one KV head at a time."""
        run, (segments, sequences) = self.framework.run, self.tables(KVLayout.GATHERED)
        parts = [(Part(head), *self.keys(rows, slice(head, head + 1))) for head in range(self.case.kv_heads)]
        problem = self.problem(KVLayout.GATHERED, parts[0][1])
        out, lse, dq = None, None, None
        for part, k, v in parts:
            out, lse = plan.forward(run, problem, self.q, k, v, segments, part=part, into=(out, lse))
        strides = {"dout_strides": self.strides}
        gradients = []
        for part, k, v in parts:
            statistics = plan.backward_rows(run, problem, out, lse, self.dout, self.dlse, part=part, **strides)
            arguments = self.q, k, v, self.dout, statistics
            if plan.fuses_windows(problem, part, **strides):
                tables, into = (segments, sequences), (dq, None, None)
                dq, *of_keys = plan.backward_window(run, problem, *arguments, tables, part=part, into=into, **strides)
                gradients.append(of_keys)
                continue
            gradients.append(plan.backward_keys(run, problem, *arguments, sequences, part=part, **strides))
            dq = plan.backward_queries(run, problem, *arguments, segments, part=part, into=dq, **strides)
        dk, dv = (np.concatenate([self.framework.numpy(x[i]) for x in gradients], 1) for i in (0, 1))
        return self.named(out, lse, dq, dk, dv)

    def ring(self):
        """Return the same results from one rank's keys at a time; dk and dv add up over the steps."""
        case, run = self.case, self.framework.run
        segments, sequences = self.tables(KVLayout.PEER)
        if case.world_size == 1:
            segments, sequences = segments[None], sequences[None]
        steps = []
        for step in range(case.world_size):
            peer = (self.rank - step) % case.world_size
            rows = rank_rows(case, peer)
            steps.append((rows, *self.keys(rows), segments[step], sequences[step]))
        problem = self.problem(KVLayout.PEER, steps[0][1])
        out, lse, dq = None, None, None
        parts = [Part(accumulate=step > 0, dtype="float32") for step in range(case.world_size)]
        for part, (_, k, v, segments, _) in zip(parts, steps, strict=True):
            out, lse = plan.forward(run, problem, self.q, k, v, segments, part=part, into=(out, lse))
        out = self.framework.array(self.framework.numpy(out), case.dtype)
        strides = {"dout_strides": self.strides}
        statistics = plan.backward_rows(run, problem, out, lse, self.dout, self.dlse, **strides)
        gathered = gathered_rows(case)
        sums = [np.zeros((case.total, case.kv_heads, case.head_dim), np.float32) for _ in range(2)]
        for part, (rows, k, v, segments, sequences) in zip(parts, steps, strict=True):
            arguments = self.q, k, v, self.dout, statistics
            kv = Part(accumulate=True, dtype="float32")
            into = tuple(self.framework.array(np.ones(k.shape, np.float32), "float32") for _ in range(2))
            gradients = plan.backward_keys(run, problem, *arguments, sequences, part=kv, into=into, **strides)
            dq = plan.backward_queries(run, problem, *arguments, segments, part=part, into=dq, **strides)
            for total, x in zip(sums, gradients, strict=True):
                total[rows] = self.framework.numpy(x) - 1
        return self.named(out, lse, dq, *(total[gathered] for total in sums))

    def named(self, *results):
        return {name: self.framework.numpy(x) for name, x in zip(RESULTS, results, strict=True)}
