"""The ranks of `scaling.py` in PyTorch: a process for each GPU (NCCL), or several on a CPU (gloo)."""

import json
import os
import statistics
import time

# Before the group is made: what is sent takes the multiprocessors that become free before more tiles of attention do.
os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from bench import timing
from bench.scaling.ways import PLANNED, plan_of
from zigzag_torch import (
    prepare_batch,
    shard,
    unshard,
    zigzag_attention,
    zigzag_attention_gathered,
)
from zigzag_torch.parallel.collectives import gather_into, reduce_into

MOST_SCORES = 2**31  # of one head in float32, for the reference to hold several times


class Ranks:
    """The rank of this process among the processes that torchrun started; the `chief` prints."""

    framework = "torch"
    recorded_steps = 1

    def __init__(self):
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.gpu else torch.device("cpu")
        if self.gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.gpu else "gloo", device_id=self.device if self.gpu else None)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.chief = self.rank == 0
        self.records = self.gpu
        self.versions = {
            "ranks": self.size,
            "gpu": torch.cuda.get_device_name() if self.gpu else "none",
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if self.gpu else "none",
        }

    def load(self, case):
        """Make the rows of this rank, random and different on each rank, and the results of this rank alone."""
        generator = torch.Generator(self.device).manual_seed(self.rank)

        def draw(heads):
            x = torch.randn(case.tokens, heads, case.head_dim, device=self.device, generator=generator)
            return x.to(getattr(torch, case.dtype))

        self.case = case
        self.q, self.k, self.v, self.dout = map(draw, (case.heads, case.kv_heads, case.kv_heads, case.heads))
        self.k_all, self.v_all = (x.new_empty((case.total, *x.shape[1:])) for x in (self.k, self.v))
        gather_into(self.k_all, self.k, dist.group.WORLD)
        gather_into(self.v_all, self.v, dist.group.WORLD)
        self.cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=self.device)
        out, both = self.share_calls()
        self.alone = out(), *both()
        if case.tokens * case.total <= MOST_SCORES:
            tensors = self.q, self.k_all, self.v_all, self.dout, self.cu_seqlens
            last = case.kv_heads - 1
            timing.check(case, self.rank, last, self.alone, timing.exact(case, self.rank, last, *tensors))

    def share_calls(self):
        """(forward, forward + backward) of this rank on K/V of all; they return out, and (dq, dk, dv)."""
        batch, window_size = prepare_batch(self.cu_seqlens, self.rank, self.size), self.case.window_size
        return self._both(
            (self.q, self.k_all, self.v_all),
            lambda q, k, v: zigzag_attention_gathered(q, k, v, batch, self.rank, self.size, window_size=window_size),
        )

    def calls(self, way):
        """Return the calls of a step between the ranks, like `share_calls`."""
        if way == PLANNED:
            return self._planned_calls()
        method, stride = way
        window = {"window_size": self.case.window_size}
        batch = prepare_batch(self.cu_seqlens, method=method, group=dist.group.WORLD, **window)
        options = {"method": method, "heads_k_stride": stride} | window
        # The group is not kept: its threads end with it, in `leave`.
        return self._both(
            (self.q, self.k, self.v),
            lambda q, k, v: zigzag_attention(q, k, v, batch, group=dist.group.WORLD, **options),
        )

    def _planned_calls(self):
        """Return the calls of a step on the same documents in the rows of a plan."""
        self.plan = plan_of(self.case.lengths, self.size)
        q, k, v, dout = (
            shard(unshard(self._gathered(x), self.cu_seqlens, self.size), self.plan, self.rank, self.size)
            for x in (self.q, self.k, self.v, self.dout)
        )
        batch = prepare_batch(self.plan, group=dist.group.WORLD, device=self.device)
        return self._both((q, k, v), lambda q, k, v: zigzag_attention(q, k, v, batch, group=dist.group.WORLD), dout)

    def _gathered(self, x):
        gathered = x.new_empty((self.size * len(x), *x.shape[1:]))
        gather_into(gathered, x.contiguous(), dist.group.WORLD)
        return gathered

    def _zigzag_rows(self, x):
        """Return the rows of this rank, as `load` deals them out, from a result in the rows of the plan."""
        return shard(unshard(self._gathered(x), self.plan, self.size), self.cu_seqlens, self.rank, self.size)

    def _both(self, arrays, attend, dout=None):
        leaves, dout = [x.detach().requires_grad_() for x in arrays], self.dout if dout is None else dout
        return lambda: attend(*arrays), lambda: torch.autograd.grad(attend(*leaves), leaves, dout)

    def check(self, way, forward, both):
        """Raise `AssertionError` unless a step gives the results of the ranks alone, with dK/dV summed over ranks."""
        out, dq, *sums = self.alone
        expected = [out, dq]
        for x in sums:
            expected.append(self.k.new_empty(self.k.shape, dtype=torch.float32))
            reduce_into(expected[-1], x.float(), dist.group.WORLD)
        results = forward(), *both()
        if way == PLANNED:
            results = [self._zigzag_rows(x) for x in results]
        for name, got, wanted in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
            timing.check_close(f"{self.case}, rank {self.rank}, {way}: {name}", got, wanted)

    def record(self, call):
        """Return the replay of a CUDA graph of `call`, transfers included."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # kernels are compiled, ranks agree
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        return graph.replay

    def milliseconds(self, call, steps):
        """Return the time of one of `steps` consecutive calls, which all ranks begin together."""
        dist.barrier()
        if not self.gpu:
            start = time.perf_counter()
            for _ in range(steps):
                call()
            return (time.perf_counter() - start) * 1e3 / steps
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / steps

    def mean(self, value):
        return statistics.mean(self._of_all(value))

    def slowest(self, value):
        return max(self._of_all(value))

    def _of_all(self, value):
        values: list[float] = [0.0] * self.size
        dist.all_gather_object(values, value)
        return values

    def timeline(self, call, path):
        """Return [(name, start, end) in ms] of the work of the first rank's GPU in a call; writes `path` + ".json"."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.gpu
        with profile(activities=activities, acc_events=True) as profiler:
            dist.barrier()  # in here, as profilers take their time to begin
            call()
            if self.gpu:
                torch.cuda.synchronize()
        if not self.chief:
            return []
        file = path.with_suffix(".json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
        kernels = [x for x in events if x.get("cat") == "kernel" and "AllReduce" not in x["name"]]  # but the barrier's
        return [(x["name"], x["ts"] / 1e3, (x["ts"] + x["dur"]) / 1e3) for x in kernels]

    def leave(self):
        dist.barrier()
        dist.destroy_process_group()
