"""The ranks of `scaling.py` in JAX: all GPUs of this process, or the devices of a CPU (JAX_NUM_CPU_DEVICES)."""

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Set before JAX starts: otherwise XLA's scheduler need not put attention between the start and the end of a transfer.
# By default it has one transfer in flight at a time; K and V of a window and a reduce-scatter are three.
FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_experimental_parallel_collective_overlap_limit=3"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax
from bench.scaling.ways import PLANNED, plan_of
from zigzag_jax import Batch, zigzag_attention, zigzag_attention_gathered

MOST_SCORES = 2**31  # of one head in float32, for the reference to hold several times


@dataclass(frozen=True)
class Call:
    """Jitted functions with their arrays; calling it calls them in turn, and returns their results."""

    parts: tuple[tuple[Callable, tuple], ...]

    def __call__(self):
        results = [function(*arrays) for function, arrays in self.parts]
        return results if len(results) > 1 else results[0]


class Ranks:
    """All devices, driven by one process, which prints, and waits for the slowest device."""

    framework = "jax"
    chief = True
    records = True

    def __init__(self):
        self.size = jax.device_count()
        self.mesh = jax.make_mesh((self.size,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
        self.first = jax.devices()[0]
        self.recorded_steps = 36 if self.first.platform == "gpu" else 2  # layers of a model
        self.versions = {"ranks": self.size, "gpu": self.first.device_kind, "jax": jax.__version__}

    def load(self, case):
        """Make the rows of all ranks, random and different, and the results of the first device for each rank alone."""
        self.case = case
        rows = NamedSharding(self.mesh, P("cp"))
        heads = case.heads, case.kv_heads, case.kv_heads, case.heads

        @functools.partial(jax.jit, out_shardings=rows)
        def draw():
            keys = jax.random.split(jax.random.key(0), len(heads))
            shapes = ((case.total, n, case.head_dim) for n in heads)
            return [jax.random.normal(key, shape, case.dtype) for key, shape in zip(keys, shapes, strict=True)]

        self.q, self.k, self.v, self.dout = draw()
        self.cu_seqlens = jnp.asarray(case.cu_seqlens, jnp.int32)
        self.k_all, self.v_all = (jax.device_put(x, self.first) for x in (self.k, self.v))

        def attend(q, k, v, batch):
            return zigzag_attention_gathered(q, k, v, batch, batch.rank, self.size, window_size=case.window_size)

        functions = jax.jit(attend), jax.jit(with_gradients(attend))
        self.shares = [self._share(rank, *functions) for rank in range(self.size)]
        self.alone = [(forward(), *both()[:3]) for forward, both in self.shares]
        if case.tokens * case.total <= MOST_SCORES:
            self._check_head(0)

    def _rows(self, x, rank):
        return jax.device_put(x.addressable_shards[rank].data, self.first)

    def _share(self, rank, forward, both):
        """(forward, forward + backward) of `rank` on K/V of all; they return out, and (dq, dk, dv, out)."""
        batch = zigzag_jax.prepare_batch(self.cu_seqlens, jnp.asarray([rank], jnp.int32), self.size)
        batch = jax.device_put(batch, self.first)
        arrays, dout = (self._rows(self.q, rank), self.k_all, self.v_all), self._rows(self.dout, rank)
        return Call(((forward, (*arrays, batch)),)), Call(((both, (*arrays, batch, dout)),))

    def share_calls(self):
        """(forward, forward + backward) of all ranks in turn."""
        return [Call(tuple(part for share in self.shares for part in share[i].parts)) for i in range(2)]

    def calls(self, way):
        """(forward, forward + backward) of a step between the ranks; they return out, and (dq, dk, dv, out)."""
        if way == PLANNED:
            return self._planned_calls()
        method, stride = way
        rows, replicated = P("cp"), P()
        window = {"window_size": self.case.window_size}
        halo = self.case.window_size[0] if method == "halo" and self.size > 1 else 0
        specs = Batch(replicated, rows, self.size, method, rows, rows, compared_by="cp", halo=halo)

        def spread(function, in_specs, out_specs):
            return jax.jit(jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs))

        def attend(q, k, v, batch):
            return zigzag_attention(q, k, v, batch, axis_name="cp", method=method, heads_k_stride=stride, **window)

        prepare = functools.partial(zigzag_jax.prepare_batch, axis_name="cp", method=method, **window)
        batch = spread(prepare, (replicated,), specs)(self.cu_seqlens)
        forward = spread(attend, (rows, rows, rows, specs), rows)
        both = spread(with_gradients(attend), (rows, rows, rows, specs, rows), (rows,) * 4)
        arrays = self.q, self.k, self.v
        return Call(((forward, (*arrays, batch)),)), Call(((both, (*arrays, batch, self.dout)),))

    def _planned_calls(self):
        """Return the calls of a step on the same documents in the rows of a plan."""
        self.plan, rows = plan_of(self.case.lengths, self.size), NamedSharding(self.mesh, P("cp"))

        def dealt(x):
            x = zigzag_jax.unshard(x, self.cu_seqlens, self.size)
            return jnp.concatenate([zigzag_jax.shard(x, self.plan, rank, self.size) for rank in range(self.size)])

        attention = zigzag_jax.make_zigzag_attention(self.mesh)
        batch = attention.prepare_batch(self.plan)
        *arrays, dout = (jax.jit(dealt, out_shardings=rows)(x) for x in (self.q, self.k, self.v, self.dout))
        forward, both = jax.jit(attention), jax.jit(with_gradients(attention))
        return Call(((forward, (*arrays, batch)),)), Call(((both, (*arrays, batch, dout)),))

    def _zigzag_rows(self, x):
        """Return all rows, as `load` deals them out, from a result in the rows of the plan."""

        def dealt(x):
            x = zigzag_jax.unshard(x, self.plan, self.size)
            of_ranks = [zigzag_jax.shard(x, self.cu_seqlens, rank, self.size) for rank in range(self.size)]
            return jnp.concatenate(of_ranks)

        return jax.jit(dealt, out_shardings=NamedSharding(self.mesh, P("cp")))(x)

    def check(self, way, forward, both):
        """Raise `AssertionError` unless a step gives the results of the ranks alone, with dK/dV summed over ranks."""
        results = forward(), *both()[:3]
        out, dq, *gradients = map(self._zigzag_rows, results) if way == PLANNED else results
        for rank, (wanted_out, wanted_dq, *_) in enumerate(self.alone):
            for name, got, wanted in (("out", out, wanted_out), ("dq", dq, wanted_dq)):
                check_close(f"{self.case}, rank {rank}, {way}: {name}", self._rows(got, rank), wanted)
        for i, (name, got) in enumerate(zip(("dk", "dv"), gradients, strict=True)):
            wanted = sum(alone[2 + i].astype(jnp.float32) for alone in self.alone)
            check_close(f"{self.case}, {way}: {name}", jax.device_put(got, self.first), wanted)

    def _check_head(self, rank):
        """`AssertionError` unless the last query head of out and dq of `rank` agrees with the float32 reference."""
        window_size = self.case.window_size
        attend = functools.partial(zigzag_attention_gathered, backend="reference", window_size=window_size)

        @jax.jit
        def out_and_dq(*arrays):
            *arrays, dout = (x[:, -1:].astype(jnp.float32) for x in arrays)
            out, pullback = jax.vjp(lambda *x: attend(*x, self.cu_seqlens, rank, self.size), *arrays)
            return out, pullback(dout)[0]

        expected = out_and_dq(self._rows(self.q, rank), self.k_all, self.v_all, self._rows(self.dout, rank))
        for name, got, wanted in zip(("out", "dq"), self.alone[rank], expected, strict=False):
            check_close(f"{self.case}, rank {rank}: {name} of the last head", got[:, -1:], wanted)

    def record(self, call):
        """Return a call of `recorded_steps` steps in one program, for which the host starts once."""
        return Call(tuple((repeated(function, self.recorded_steps), arrays) for function, arrays in call.parts))

    def milliseconds(self, call, steps):
        """Return the time of one of `steps` consecutive calls, until all devices have finished all of them."""
        start = time.perf_counter()
        for _ in range(steps):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) * 1e3 / steps

    def mean(self, value):
        """Return the mean time of a share: `value` is the time of the shares of all ranks together."""
        return value / self.size

    def slowest(self, value):
        return value

    def timeline(self, call, path):
        """Return [(name, start, end) in ms] of the work of the first GPU in a call; writes `path` + ".json.gz"."""
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                jax.block_until_ready(call())
            (events,) = Path(directory).rglob("*.trace.json.gz")
            shutil.copy(events, f"{path}.json.gz")
            (planes,) = Path(directory).rglob("*.xplane.pb")
            planes = ProfileData.from_file(str(planes)).planes
            streams = [
                line
                for plane in planes
                if plane.name.startswith("/device:GPU:0")
                for line in plane.lines
                if line.name.startswith("Stream")
            ]
            return [(event.name, event.start_ns / 1e6, event.end_ns / 1e6) for line in streams for event in line.events]

    def leave(self):
        pass


def repeated(function, steps):
    """Return a jitted function that calls `function` in a loop of `steps` steps, and returns (last results, 0)."""

    def call(*arrays):
        def step(_, carry):
            # Behind the barrier the arrays differ from step to step for XLA, which otherwise computes one step only.
            same, mark = jax.lax.optimization_barrier((arrays, carry[1]))
            return function(*same), mark

        return jax.lax.fori_loop(1, steps, step, (function(*arrays), jnp.int32(0)))

    return jax.jit(call)


def with_gradients(attend):
    """`(q, k, v, batch, dout) -> (dq, dk, dv, out)`."""

    def call(q, k, v, batch, dout):
        out, pullback = jax.vjp(lambda *x: attend(*x, batch), q, k, v)
        # In a model dout comes behind out. Without the barrier XLA moves K/V for both passes together.
        out, dout = jax.lax.optimization_barrier((out, dout))
        return *pullback(dout), out

    return call


def check_close(name, got, expected):
    """`AssertionError` unless `got` is as close to `expected` as bfloat16 arithmetic leaves it."""
    expected = expected.astype(jnp.float32)
    error = float(jnp.linalg.norm(got.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))
    assert error < 5e-3, f"{name} is off by {error:.1e}"
