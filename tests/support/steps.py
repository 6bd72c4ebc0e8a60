"""Training steps of the ranks of a group, whose outcomes tests compare, in as many threads as there are groups."""

import re
import threading
import time

import pytest
import torch

import zigzag_torch
from tests.support.machine import LATENESS

TIMEOUT = 2 * LATENESS  # seconds until an agreement gives up; a rank that is late, but in time, comes after half of it
TOO_LATE = TIMEOUT + LATENESS  # seconds after which the other ranks have given up
PLENTY = 20 * LATENESS  # timeout of agreements to which all ranks come; naming a missing rank takes a twentieth of it
ENDS = 2 * PLENTY  # a call that takes longer than this hangs
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 8, 4, 2, 16
GOOD, LENGTHS, DOCUMENTS = (0, 2, 8), (0, 4, 8), (0, 2, 6, 8)  # offsets of sequences in the rows of a rank


class Program:
    """The training steps of one rank of a group."""

    def __init__(self, group, method, backend="reference"):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.options = {"group": group, "method": method, "backend": backend}
        generator = torch.Generator().manual_seed(self.rank)
        shapes = [(TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        self.leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        self.batch = self.expected = None

    def cu_seqlens(self, local=GOOD):
        return torch.tensor(local, dtype=torch.int32) * self.size

    def prepare(self, local=GOOD, **changed):
        self.batch = zigzag_torch.prepare_batch(self.cu_seqlens(local), **self.options, **changed)
        return self.batch

    def forward(self, leaves=None, **changed):
        q, k, v = leaves or self.leaves
        arguments = {"cu_seqlens": self.batch} | self.options | changed
        return zigzag_torch.zigzag_attention(q, k, v, **arguments)

    def first_call(self, leaves=None, **changed):
        """Nothing was compared before it: equal lengths, which no rank prepares."""
        return self.forward(leaves, **({"cu_seqlens": None} | changed))

    def backward(self, out):
        return torch.autograd.grad(out.sum(), self.leaves)

    def step(self):
        """A good step; all are alike."""
        self.prepare()
        out = self.forward()
        results = [out.detach(), *self.backward(out)]
        self.expected = self.expected or results
        for got, expected in zip(results, self.expected, strict=True):
            assert not got.isnan().any()
            assert torch.equal(got, expected)

    def caught(self):
        """An error of rank 0, which all ranks catch."""
        with pytest.raises(ValueError, match=r"causal: expected True or False, got 'no'$"):
            self.forward(**({"causal": "no"} if self.rank == 0 else {}))


def error_of(call):
    """The error that a call raises, or None; it ends in time."""
    started, error = time.monotonic(), None
    try:
        call()
    except (ValueError, RuntimeError) as caught:
        error = caught
    waited = time.monotonic() - started
    assert waited < ENDS, f"waited {waited} s, for {error}"
    return error


def expect(error, kind, pattern):
    assert type(error) is kind, repr(error)
    assert re.search(pattern, str(error)), f"{error}\nis not: {pattern}"


def at_once(checks):
    """Run checks of programs on groups of their own in a thread each, at the same time."""
    failures = []

    def run(check):
        try:
            check()
        except BaseException as error:
            failures.append((check, error))

    threads = [threading.Thread(target=run, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        check, error = failures[0]
        raise AssertionError(f"{len(failures)} of {len(threads)} failed, first {check}") from error
