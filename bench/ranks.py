"""Times all ranks of one long sequence in turn on one GPU, in one launch and in parts.

    python bench/ranks.py [--json FILE] [--plot FILE]

Each rank computes its attention in three ways, which take turns: one launch on gathered K/V, the windows of KV heads of
an all-gather, and the steps of a ring. There are no transfers, so the time of windows or steps, divided by the time of
one launch, is the cost of working in parts. Everything is checked before it is timed. The exit status is 1 if the
slowest rank takes more than 1.02 times as long as the fastest, or if an all-gather call needs more memory at its peak
than the buffers of K/V and dK/dV of its windows.
"""

import argparse
import itertools
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from matplotlib.figure import Figure
from tqdm import tqdm

from bench import timing
from bench.arguments import new_file
from examples.figures import FAINT, INK, RANK_COLOURS
from tests.support.cases import CASES
from zigzag_kernels import cost, plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.plan import Part
from zigzag_kernels.problem import make_problem
from zigzag_torch import launch
from zigzag_torch.parallel import Residuals, Tables, allgather, transport_of

NAMES = ("rectangle-d128", "rectangle-d64")
WAYS, DIRECTIONS = ("one launch", "all-gather", "ring"), ("forward", "backward")
MOST = 1.02  # slowest over fastest rank
ROUNDS = 21  # of one launch: medians of seven left 1 % of noise, and the largest of eight over the smallest 2 %


def pack_windows(k, v, heads):
    """Gathered `k, v` as all-gathers of `heads` KV heads deliver them: `[W * T, 2, heads, head_dim]` each."""
    windows = zip(k.split(heads, 1), v.split(heads, 1), strict=True)
    return [torch.stack(window, 1) for window in windows]


class Player:
    """One rank of a case, which computes its attention in one launch, in windows of heads or in ring steps."""

    def __init__(self, case, rank, tensors, heads_k_stride, backend="triton"):
        self.case, self.rank, self.window = case, rank, heads_k_stride
        self.q, self.k, self.v, self.dout, cu_seqlens = tensors
        self.backend, self.target = backend, launch.target(backend, self.q.device)
        self.strides = {"dout_strides": self.dout.stride()[:2]}
        self.whole = timing.torch_calls(case, rank, *tensors, backend=backend)
        own = torch.tensor([rank], dtype=torch.int32, device=self.q.device)
        self.tables = {
            layout: plan.segment_tables(
                launch.run, cu_seqlens, own, sequences=len(case.lengths), world_size=case.world_size,
                target=self.target, kv_layout=layout,
            )
            for layout in (KVLayout.GATHERED, KVLayout.PEER)
        }  # fmt: skip

    def problem(self, k, kv_layout):
        kv = launch.describe(k)
        return make_problem(
            launch.describe(self.q), kv, kv,
            make_call_spec(head_dim=self.case.head_dim, backend=self.backend, causal=self.case.causal),
            sequences=len(self.case.lengths), world_size=self.case.world_size, target=self.target, kv_layout=kv_layout,
            kv_heads=self.case.kv_heads, gluon=launch.can_launch_gluon(self.backend, k, self.q, self.dout),
        )  # fmt: skip

    def windows_forward(self, windows):
        """(out, lse); `windows` as from `pack_windows`."""
        segments, _ = self.tables[KVLayout.GATHERED]
        results = None, None
        for i, window in enumerate(windows):
            k, v = window.unbind(1)
            part = Part(i * self.window)
            problem = self.problem(k, KVLayout.GATHERED)
            results = plan.forward(launch.run, problem, self.q, k, v, segments, part=part, into=results)
        return results

    def windows_backward(self, windows, out, lse, reduce):
        """(dq, [what `reduce` keeps of dk, dv `[W * T, window, head_dim]` float32, whose memory is used again])."""
        segments, sequences = self.tables[KVLayout.GATHERED]
        dq, into, kept = None, (None, None), []
        for i, window in enumerate(windows):
            k, v = window.unbind(1)
            problem = self.problem(k, KVLayout.GATHERED)
            part, summed = Part(i * self.window), Part(i * self.window, dtype="float32")
            rows = plan.backward_rows(launch.run, problem, out, lse, self.dout, None, part=part, **self.strides)
            arguments = launch.run, problem, self.q, k, v, self.dout, rows
            if plan.fuses_windows(problem, summed, **self.strides):
                tables, results = (segments, sequences), (dq, *into)
                dq, *into = plan.backward_window(*arguments, tables, part=summed, into=results, **self.strides)
                kept.append(reduce(*into))
                continue
            into = plan.backward_keys(*arguments, sequences, part=summed, into=into, **self.strides)
            kept.append(reduce(*into))
            dq = plan.backward_queries(*arguments, segments, part=part, into=dq, **self.strides)
        return dq, kept

    def local_rows(self, dk, dv):
        """A reduce-scatter with no other ranks: this rank's rows, in the dtype of k."""
        rows = slice(self.rank * self.case.tokens, (self.rank + 1) * self.case.tokens)
        return dk[rows].to(self.k.dtype), dv[rows].to(self.k.dtype)

    def peers(self):
        """(step, its tables, k, v and rank of the peer), as K/V come by."""
        tokens, ranks = self.case.tokens, self.case.world_size
        for step in range(ranks):
            peer = (self.rank - step) % ranks
            rows = slice(peer * tokens, (peer + 1) * tokens)
            segments, sequences = (table[step] for table in self.tables[KVLayout.PEER])
            yield step, segments, sequences, self.k[rows], self.v[rows], peer

    def ring_forward(self):
        """(out, lse)."""
        problem = self.problem(self.k[: self.case.tokens], KVLayout.PEER)
        results = None, None
        for step, segments, _, k, v, _ in self.peers():
            part = Part(accumulate=step > 0, dtype="float32")
            results = plan.forward(launch.run, problem, self.q, k, v, segments, part=part, into=results)
        return results[0].to(self.q.dtype), results[1]

    def ring_backward(self, out, lse, sums):
        """(dq, and dk, dv of the last peer in the dtype of k).

        dk, dv are added to `sums [W, 2, T, kv_heads, head_dim]`; the first step, of the rank's own keys, overwrites it.
        """
        problem = self.problem(self.k[: self.case.tokens], KVLayout.PEER)
        rows = plan.backward_rows(launch.run, problem, out, lse, self.dout, None, **self.strides)
        dq, last = None, None
        for step, segments, sequences, k, v, peer in self.peers():
            arguments = launch.run, problem, self.q, k, v, self.dout, rows
            part = Part(accumulate=step > 0, dtype="float32")
            last = plan.backward_keys(*arguments, sequences, part=part, into=tuple(sums[peer]), **self.strides)
            dq = plan.backward_queries(*arguments, segments, part=part, into=dq, **self.strides)
        return dq.to(self.q.dtype), *(x.to(self.k.dtype) for x in last)

    def new_sums(self):
        """Room for dK/dV of all ranks, as the ring carries them."""
        shape = self.case.world_size, 2, self.case.tokens, *self.k.shape[1:]
        return torch.zeros(shape, dtype=torch.float32, device=self.k.device)

    def check(self, windows, tensors):
        """Raise `AssertionError` unless one launch agrees with float32, and windows and ring agree closely with it.

        Windows may have other tiles than one launch, because fewer heads have fewer rows.
        """
        name = f"{self.case}, rank {self.rank}"
        out, dq, dk, dv = results = self.whole.results()
        last = self.case.kv_heads - 1
        timing.check(self.case, self.rank, last, results, timing.exact(self.case, self.rank, last, *tensors))
        in_windows, lse = self.windows_forward(windows)
        dq_in_windows, kept = self.windows_backward(windows, out, lse, lambda *x: torch.stack(x))
        sums = torch.cat(kept, 2)
        results = in_windows, dq_in_windows, *sums
        for what, a, b in zip(("out", "dq", "dk", "dv"), results, (out, dq, dk, dv), strict=True):
            timing.check_close(f"{name}: {what} of windows", a, b)
        around, ring_lse = self.ring_forward()
        carried = self.new_sums()
        dq_around, *_ = self.ring_backward(around, ring_lse, carried)
        dk_around, dv_around = carried.transpose(0, 1).flatten(1, 2)
        results, expected = (around, ring_lse, dq_around, dk_around, dv_around), (out, lse, dq, *sums)
        for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
            timing.check_close(f"{name}: {what} of the ring", a, b)

    def calls(self, windows, sums):
        """Return {(way, direction): call} for the calls that `check` has tested."""
        out, lse = self.windows_forward(windows)
        return {
            ("one launch", "forward"): self.whole.forward,
            ("one launch", "backward"): self.whole.backward,
            ("all-gather", "forward"): lambda: self.windows_forward(windows),
            ("all-gather", "backward"): lambda: self.windows_backward(windows, out, lse, self.local_rows),
            ("ring", "forward"): self.ring_forward,
            ("ring", "backward"): lambda: self.ring_backward(out, lse, sums),
        }

    def extra_memory(self, windows):
        """Bytes at the peak of one all-gather call, forward and backward, beyond results and gradients.

        The call is the product's; in place of collectives, the first brings the `windows` and the second does nothing.
        """
        gathers = itertools.cycle(windows)
        stand_ins = {
            "resolve": lambda _: SimpleNamespace(size=lambda: self.case.world_size, rank=lambda: self.rank),
            "agree_on_call": lambda *_, **__: None,
            "gather_into": lambda buffer, own, group: buffer.copy_(next(gathers).flatten(1, 2)),
            "reduce_into": lambda total, x, group: None,
        }
        rows = slice(self.rank * self.case.tokens, (self.rank + 1) * self.case.tokens)
        local = self.q, self.k[rows], self.v[rows]
        call = make_call_spec(
            head_dim=self.case.head_dim, backend=self.backend, causal=self.case.causal, heads_k_stride=self.window
        )
        sizes = len(self.case.lengths), self.case.world_size
        transport, tables = (
            transport_of(*local, call, *sizes, KVLayout.PEER, "group"),
            Tables(*self.tables[KVLayout.GATHERED]),
        )
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with mock.patch.multiple(allgather, **stand_ins):
            out, lse = transport.forward(*local, tables)
            dq, dkv, _ = transport.backward(Residuals(*local, out, lse), self.dout, None, tables)
        peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in (out, lse, dq, dkv))
        timing.check_close(f"{self.case}, rank {self.rank}: dq of the call", dq, self.whole.backward()[0])
        return peak


def spread(times, way, direction):
    """Slowest over fastest rank, of `times` {(rank, way, direction): ms}."""
    chosen = [ms for (_, *key), ms in times.items() if key == [way, direction]]
    return max(chosen) / min(chosen)


def table(times):
    """Return `times` as Markdown: a row for each rank, then slowest / fastest, and the mean / mean of one launch."""
    columns = [(way, direction) for direction in DIRECTIONS for way in WAYS]
    ranks = sorted({rank for rank, *_ in times})
    mean = {key: statistics.mean(times[rank, *key] for rank in ranks) for key in columns}
    rows = [[f"rank {rank}", *(f"{times[rank, *key]:.3f} ms" for key in columns)] for rank in ranks]
    rows.append(["slowest / fastest", *(f"{spread(times, *key):.4f}" for key in columns)])
    rows.append(["mean over one launch", *(f"{mean[key] / mean['one launch', key[1]]:.3f}" for key in columns)])
    header = ["", *(f"{direction}, {way}" for way, direction in columns)]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def save_plot(path, measured):
    """Bars of every rank's milliseconds; `measured` {case name: times}."""
    figure = Figure(figsize=(13, 3.4 * len(measured)), dpi=150, layout="constrained")
    for row, (name, times) in zip(figure.subplots(len(measured), 2, squeeze=False), measured.items(), strict=True):
        ranks = sorted({rank for rank, *_ in times})
        for axes, direction in zip(row, DIRECTIONS, strict=True):
            for i, way in enumerate(WAYS):
                heights = [times[rank, way, direction] for rank in ranks]
                at = [rank + 0.27 * (i - 1) for rank in ranks]
                label = f"{way}, {spread(times, way, direction):.3f}"
                axes.bar(at, heights, 0.25, color=RANK_COLOURS[i], edgecolor=INK, linewidth=0.6, label=label)
            axes.set_title(f"{name}, {direction}: ms of each rank, in turn on one GPU", fontsize=11)
            axes.set_xticks(ranks)
            axes.set_xlabel("rank")
            axes.set_ylim(0, 1.4 * max(ms for (*_, key), ms in times.items() if key == direction))
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", title="slowest over fastest rank")
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=new_file, help="write what was measured to this file too")
    parser.add_argument("--plot", type=new_file, help="draw it into this file")
    options = parser.parse_args()
    gpu = timing.require_gpu()
    print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}; medians")
    measured, memory = {}, {}
    for case in [case for case in CASES if case.name in NAMES]:
        sizes = {"heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "dtype": case.dtype}
        step = cost.Step(lengths=case.lengths, world_size=case.world_size, causal=case.causal, **sizes)
        tensors = timing.inputs(case)
        windows = pack_windows(*tensors[1:3], step.window)
        players = [Player(case, rank, tensors, step.window) for rank in range(case.world_size)]
        for player in tqdm(players, desc=f"{case}: checking", unit="rank"):
            player.check(windows, tensors)
        sums = players[0].new_sums()
        calls = {
            (player.rank, *key): partial(timing.milliseconds, call, lambda _: torch.cuda.synchronize())
            for player in players
            for key, call in player.calls(windows, sums).items()
        }
        whole = {key: call for key, call in calls.items() if key[1] == WAYS[0]}
        parts = {key: call for key, call in calls.items() if key not in whole}
        rounds = timing.in_turns(parts) | timing.in_turns(whole, rounds=ROUNDS)
        times = {key: statistics.median(samples) for key, samples in rounds.items()}
        del calls, whole, parts, sums
        measured[case.name] = times
        memory[case.name] = {
            "measured": players[0].extra_memory(windows),
            "buffers": 2 * windows[0].nbytes + 4 * windows[0].numel(),
            "predicted": sum(cost.extra_memory(step).values()),
        }
        print(f"\n{case}: W = {case.world_size}, {case.tokens} local tokens, windows of {step.window} KV heads\n")
        print("\n".join(table(times)))
        print(
            "\nextra memory of one all-gather call: {measured:,} bytes measured, {buffers:,} in two K/V buffers and "
            "one float32 dK/dV buffer, {predicted:,} predicted for JAX".format(**memory[case.name])
        )
        del players, tensors, windows
        torch.cuda.empty_cache()
    if options.json:
        rows = [
            {"case": name, "rank": rank, "way": way, "direction": direction, "ms": ms}
            for name, times in measured.items()
            for (rank, way, direction), ms in times.items()
        ]
        options.json.write_text(json.dumps({"gpu": gpu, "rows": rows, "memory": memory}))
    if options.plot:
        save_plot(options.plot, measured)
    worst = max(spread(times, "one launch", direction) for times in measured.values() for direction in DIRECTIONS)
    print(f"\nslowest over fastest rank in one launch: {worst:.4f} at worst, {MOST} allowed")
    return 0 if worst <= MOST and all(x["measured"] <= x["buffers"] for x in memory.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
