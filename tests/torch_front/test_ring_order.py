"""Kernels of a ring step wait for the transfers of their arrays, and for no others.

No data moves: a stand-in for transfers knows which are under way, and every launch what it reads and writes.
"""

from types import SimpleNamespace

import pytest
import torch

from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import KVLayout, Method
from zigzag_kernels.problem import segment_table_shapes
from zigzag_torch import launch
from zigzag_torch.parallel import Residuals, Tables, ring, transport_of

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 16


def place(x):
    return x.untyped_storage().data_ptr()


class Transfers:
    """Transfers under way, and launches, which must not touch what these move."""

    def __init__(self):
        self.under_way, self.beside, self.launched = [], 0, []

    def exchange(self, send, receive, group, hops=1, tag=0):
        for x in (send, receive):
            assert place(x) not in self.received(), "moves what has not arrived"
        assert place(receive) not in self.sent(), "overwrites what has not left"
        assert all(tag != x.tag for x in self.under_way), "has the tag of another message that is under way"
        transfer = SimpleNamespace(sent=send, received=receive, tag=tag)
        self.under_way.append(transfer)
        return [transfer]

    def wait(self, works, group):
        self.under_way = [x for x in self.under_way if not any(x is work for work in works)]

    def sent(self):
        return {place(x.sent) for x in self.under_way}

    def received(self):
        return {place(x.received) for x in self.under_way}

    def run(self, launched, first, *others):
        arrays = dict(zip(launched.inputs, (first, *others), strict=True))
        outputs = []
        for output in launched.outputs:
            x = arrays.pop(launched.in_place.get(output.name), None)
            outputs.append(launch.allocate(output, first) if x is None else x)
        name = launched.kernel.fn.__name__
        for x in (*outputs, *(x for x in arrays.values() if x is not None)):
            assert place(x) not in self.received(), f"{name} touches what has not arrived"
        for x in outputs:
            assert place(x) not in self.sent(), f"{name} overwrites what has not left"
        self.beside += bool(self.under_way)
        self.launched.append(name)
        return tuple(outputs)


@pytest.fixture
def transfers(monkeypatch):
    transfers = Transfers()
    monkeypatch.setattr(launch, "run", transfers.run)
    monkeypatch.setattr(ring, "exchange", transfers.exchange)
    monkeypatch.setattr(ring, "wait", transfers.wait)
    monkeypatch.setattr(ring, "agree_on_call", lambda *_, **__: None)
    return transfers


def ring_of(world_size, monkeypatch):
    """(q, k, v), the tables, and the ring of `world_size` ranks."""
    monkeypatch.setattr(ring, "resolve", lambda _: SimpleNamespace(size=lambda: world_size, rank=lambda: 0))
    qkv = [torch.zeros(TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tables = Tables(*(torch.zeros(shape, dtype=torch.int32) for shape in segment_table_shapes(1, world_size)))
    call = make_call_spec(head_dim=HEAD_DIM, backend="interpret", method=Method.RING.value)
    return qkv, tables, transport_of(*qkv, call, 1, world_size, KVLayout.PEER, "group")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_forward(world_size, transfers, monkeypatch):
    qkv, tables, transport = ring_of(world_size, monkeypatch)
    transport.forward(*qkv, tables)
    assert not transfers.under_way, "returns before all has arrived"
    assert transfers.launched.count("attention_forward") == world_size
    assert transfers.beside == world_size - 1  # steps during which keys travel: all but the last


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_backward(world_size, transfers, monkeypatch):
    qkv, tables, transport = ring_of(world_size, monkeypatch)
    out, lse, dout = torch.zeros_like(qkv[0]), torch.zeros(HEADS, TOKENS), torch.zeros_like(qkv[0])
    transport.backward(Residuals(*qkv, out, lse), dout, None, tables)
    assert not transfers.under_way, "returns before all has arrived"
    for name in ("backward_dkdv", "backward_dq"):
        assert transfers.launched.count(name) == world_size
    # dK/dV beside keys in all steps but the last, dQ beside keys or the gradients in every step.
    assert transfers.beside == 2 * world_size - 1
