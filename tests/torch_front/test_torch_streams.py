"""The streams of an all-gather: what touches the same memory is in order, and what is to run side by side is not.

No GPU takes part: stand-ins for streams know what each has waited for, and every operation what memory it touches.
"""

import contextlib
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.hopper import needs_triton
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import segment_table_shapes
from zigzag_torch import launch
from zigzag_torch.parallel import Residuals, Tables, allgather, transport_of
from zigzag_torch.parallel.streams import Streams

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 4, 16


class Stream:
    """What is done when this stream comes to what it is given next; `forked` from the caller's, as in a capture."""

    def __init__(self, forked=False):
        self.done, self.forked = set(), forked

    def wait_stream(self, other):
        assert other.forked, "waits for a stream that has not waited for the caller's"
        self.done, self.forked = self.done | other.done, True


class Recorder(TorchDispatchMode):
    """Operations by name, with all that was done before each, and what it read and wrote."""

    def __init__(self):
        super().__init__()
        self.streams = Streams(Stream(forked=True), Stream(), Stream())
        self.stream = self.streams.current
        self.before, self.accesses, self.counts = {}, [], {}
        self.kept, self.allocated, self.freed = [], {}, {}

    @contextlib.contextmanager
    def on(self, stream):
        outer, self.stream = self.stream, stream
        yield
        self.stream = outer

    def record(self, name, reads, writes, part=None):
        """`part` of an array: what is written under other parts of it does not overlap."""
        index = self.counts[name] = self.counts.get(name, -1) + 1
        operation = name, index
        self.before[operation] = set(self.stream.done)
        self.stream.done = self.stream.done | {operation}
        for x, written in [(x, False) for x in reads] + [(x, True) for x in writes]:
            self.kept.append(x.untyped_storage())  # so that its memory is not that of another
            self.accesses.append((operation, x.untyped_storage().data_ptr(), part if written else None, written))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.cat.out:
            self.record("pack", args[0], [kwargs["out"]])
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            self.record("copy out", [args[0]], [result])
        return result

    def run(self, launched, first, *others):
        arrays = dict(zip(launched.inputs, (first, *others), strict=True))
        outputs = []
        for output in launched.outputs:
            x = arrays.pop(launched.in_place.get(output.name), None)
            if x is None:
                x = launch.allocate(output, first)
                self.allocated[x.data_ptr()] = self.stream
                weakref.finalize(x, self.freed.setdefault(self.stream, []).append, x.detach())
            outputs.append(x)
        reads = [x for x in arrays.values() if x is not None]
        # What was freed on this stream may now be any of these outputs, or what the kernel has for itself.
        writes = outputs + self.freed.get(self.stream, [])
        self.record(launched.kernel.fn.__name__, reads, writes, part=launched.scalars.get("first_kv_head"))
        return tuple(outputs)

    def ordered(self, first, second):
        return first in self.before[second]

    def check(self, results):
        for (a, *there, a_writes), (b, *here, b_writes) in itertools.combinations(self.accesses, 2):
            apart = there[0] != here[0] or (a_writes and b_writes and there[1] != here[1])
            if a != b and not apart and (a_writes or b_writes):
                assert self.ordered(a, b) or self.ordered(b, a), f"{a} and {b} touch the same memory in no order"
        current = self.streams.current
        assert set(self.before) <= current.done, "the caller goes on before all is done"
        assert all(self.allocated.get(x.data_ptr(), current) is current for x in results), "memory of another stream"
        for operation, place, *_ in self.accesses:
            stream = self.allocated.get(place, current)
            assert operation in stream.done, f"memory of {operation} is freed to a stream that goes on before it"


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(launch, "run", recorder.run)
    monkeypatch.setattr(allgather, "resolve", lambda _: SimpleNamespace(size=lambda: 2, rank=lambda: 0))
    monkeypatch.setattr(allgather, "agree_on_call", lambda *_, **__: None)
    monkeypatch.setattr(allgather, "streams_of", lambda _: recorder.streams)
    monkeypatch.setattr(allgather, "on", recorder.on)
    for name in ("gather", "reduce"):

        def transfer(into, own, group, name=name):
            recorder.record(name, [own], [into, own])

        monkeypatch.setattr(allgather, f"{name}_into", transfer)
    return recorder


def arguments(stride, head_dim=HEAD_DIM, dtype=torch.float32, backend="interpret", **options):
    """(q, k, v), the tables, and the all-gather of `stride` heads at a time."""
    qkv = [torch.zeros(TOKENS, heads, head_dim, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tables = Tables(*(torch.zeros(shape, dtype=torch.int32) for shape in segment_table_shapes(1)))
    call = make_call_spec(head_dim=head_dim, backend=backend, heads_k_stride=stride, **options)
    return qkv, tables, transport_of(*qkv, call, 1, 2, KVLayout.PEER, "group")


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_forward(recorder, stride):
    qkv, tables, transport = arguments(stride)
    with recorder:
        results = transport.forward(*qkv, tables)
    recorder.check(results)
    for i in range(1, KV_HEADS // stride):
        before, kernel = (("attention_forward", x) for x in (i - 1, i))
        assert not recorder.ordered(before, kernel)
        assert not recorder.ordered(before, ("gather", i))


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_backward(recorder, stride, has_sinks):
    qkv, tables, transport = arguments(stride, has_sinks=has_sinks)
    sinks = torch.zeros(HEADS) if has_sinks else None
    out, lse, dout = torch.zeros_like(qkv[0]), torch.zeros(HEADS, TOKENS), torch.zeros_like(qkv[0])
    with recorder:
        dq, dkv, *dsinks = transport.backward(Residuals(*qkv, out, lse), dout, None, tables, sinks)
    recorder.check((dq, dkv, *dsinks) if has_sinks else (dq, dkv))
    for i in range(KV_HEADS // stride):
        rows, keys, queries = ("backward_delta", i), ("backward_dkdv", i), ("backward_dq", i)
        assert not recorder.ordered(keys, queries)
        assert recorder.ordered(rows, keys)
        assert recorder.ordered(rows, queries)
        for reduce in (("reduce", 2 * i), ("reduce", 2 * i + 1)):
            assert not recorder.ordered(queries, reduce)
        if i:
            keys_before, queries_before = ("backward_dkdv", i - 1), ("backward_dq", i - 1)
            assert not recorder.ordered(queries_before, rows)
            assert not recorder.ordered(queries_before, keys)
            for kernel in (keys_before, queries_before):
                assert not recorder.ordered(kernel, ("gather", i))


@pytest.fixture
def on_hopper(monkeypatch):
    """Problems are as on a Hopper GPU, where tiles of keys take turns wherever they can."""
    monkeypatch.setattr(launch, "target", lambda *_: "9.0")
    monkeypatch.setattr(launch, "can_launch_gluon", lambda *_: True)
    monkeypatch.setenv(HOPPER.variable, "1")
    monkeypatch.setenv(rules.TURNS, "1")
    with plan.use_planner(plan.Planner()):
        yield


def gradients(recorder, stride, *, misaligned=False, **options):
    """dq, dk/dv and dsinks of an all-gather of `stride` heads at a time, whose kernels for Hopper can run or not."""
    qkv, tables, transport = arguments(stride, 64, torch.bfloat16, "triton", **options)
    sinks = torch.zeros(HEADS) if "has_sinks" in options else None
    out, lse, dout = torch.zeros_like(qkv[0]), torch.zeros(HEADS, TOKENS), torch.zeros_like(qkv[0])
    if misaligned:
        dout = torch.zeros(TOKENS, HEADS, 65, dtype=dout.dtype)[..., 1:]
    with recorder:
        return transport.backward(Residuals(*qkv, out, lse), dout, None, tables, sinks)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"has_sinks": True}, {"grad_reduce_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_sums_of_a_window_travel_beside_the_one_kernel_of_the_next(recorder, on_hopper, stride, options):
    dq, dkv, dsinks = gradients(recorder, stride, **options)
    recorder.check((dq, dkv) if dsinks is None else (dq, dkv, dsinks))
    count = KV_HEADS // stride
    assert dq.shape == (TOKENS, HEADS, 64)
    assert dq.dtype == dkv.dtype == torch.bfloat16
    launched = {"backward_delta", "clear_sums", "backward_fused_hopper", "finish_dq"}
    assert {name for name, _ in recorder.before if "_" in name and "sink" not in name} == launched
    for i in range(count):
        of_window = [(name, i) for name in ("backward_delta", "clear_sums", "backward_fused_hopper", "finish_dq")]
        for before, after in itertools.pairwise(of_window):
            assert recorder.ordered(before, after)
        for reduce in (("reduce", 2 * i), ("reduce", 2 * i + 1)):
            assert recorder.ordered(of_window[2], reduce)
            if i + 1 < count:
                assert not recorder.ordered(reduce, ("backward_fused_hopper", i + 1))
        if i:
            for kernel in of_window[:3]:
                assert not recorder.ordered(("finish_dq", i - 1), kernel)
            assert not recorder.ordered(("backward_fused_hopper", i - 1), ("gather", i))


@needs_triton
def test_transfers_are_in_one_order_whatever_kernels_a_rank_runs(recorder, on_hopper):
    """Ranks whose dO lie differently in memory may run other kernels, and wait for each other in all transfers."""
    gradients(recorder, 1)
    names = [name for name, _ in recorder.before]
    assert "backward_fused_hopper" in names
    recorder.before.clear()
    gradients(recorder, 1, misaligned=True)
    others = [name for name, _ in recorder.before]
    assert "backward_fused_hopper" not in others
    transfers = [[name for name in each if name in ("gather", "reduce")] for each in (names, others)]
    assert transfers[0] == transfers[1]
    assert transfers[0].count("gather") == KV_HEADS


@needs_triton
def test_a_single_window_is_computed_by_two_kernels(recorder, on_hopper):
    """Its sums travel beside dQ."""
    dq, dkv, _ = gradients(recorder, KV_HEADS)
    recorder.check((dq, dkv))
    assert not {"backward_fused_hopper", "finish_dq"} & {name for name, _ in recorder.before}
