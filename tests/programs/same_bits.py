"""Counts the documents whose results depend on how their batch is dealt out: there should be none.

    python -m tests.programs.same_bits --packings 2000

Each packing is attended by one rank alone, then by every rank of several world sizes, in the document layout and in
the row layout, with another document before it, and with some KV heads at a time. Output, lse and dQ of each document
must have the same bits every time. Takes the portable kernels, on a GPU if there is one, else in Triton's interpreter:
kernels for Hopper end blocks of keys with chunks.
"""

import argparse
import random
from dataclasses import dataclass, replace
from itertools import accumulate
from unittest import mock

import numpy as np
import torch

from tests.support.machine import GPU
from zigzag_kernels import plan
from zigzag_kernels.callspec import CallSpec, make_call_spec
from zigzag_kernels.modes import Layout
from zigzag_kernels.plan import Part
from zigzag_kernels.problem import ArraySpec, make_problem
from zigzag_torch import launch

DEVICE = "cuda" if GPU else "cpu"
WORLD_SIZES = (1, 2, 3, 4, 8) if GPU else (1, 2, 3, 4)  # eight take as long as all others together
SEQUENCES = 6  # entries of every cu_seqlens, so that all packings have the same launches
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
MASKS = (
    {},
    {"window_size": (7, 0)},
    {"window_size": (40, 9), "causal": False},
    {"attention_chunk": 48, "softcap": 3.0},
    {"causal": False},
)


@dataclass(frozen=True)
class Packing:
    """Documents with their arrays `[tokens, heads, head_dim]`, and the mask under which they are attended."""

    lengths: tuple[int, ...]
    call: CallSpec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def draw(seed: int, longest: int) -> Packing:
    """Return the packing number `seed`: 1 to 5 documents of up to `longest` tokens."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = tuple(choose.randint(1, longest) for _ in range(choose.randint(1, SEQUENCES - 1)))
    call = make_call_spec(head_dim=HEAD_DIM, backend="triton" if GPU else "interpret", **choose.choice(MASKS))
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    arrays = (torch.randn(sum(lengths), n, HEAD_DIM, generator=generator).to(DEVICE, torch.bfloat16) for n in heads)
    return Packing(lengths, call, *arrays)


def rows_of_rank(starts: list[int], lengths: list[int], total: int, layout: str, rank: int, world_size: int):
    """Return the global rows that `rank` holds: two chunks of each sequence, or of the packed row as a whole."""
    pieces = [(0, total)] if layout == Layout.ROW else list(zip(starts, lengths, strict=True))
    rows = []
    for start, length in pieces:
        chunk = length // (2 * world_size)
        for number in (rank, 2 * world_size - 1 - rank):
            rows += range(start + number * chunk, start + (number + 1) * chunk)
    return rows if world_size > 1 else list(range(total))


def attend(packing: Packing, world_size: int, layout: str, stride: int, before: int) -> list[tuple[torch.Tensor, ...]]:
    """Return (out, lse, dq) of each document; a document of `before` tokens lies before the first."""
    step = 2 * world_size if world_size > 1 and layout == Layout.DOCUMENT else 1
    real = [before, *packing.lengths]
    padded = [-(-length // step) * step for length in real]
    offsets = list(accumulate(padded, initial=0))
    total = -(-offsets[-1] // (2 * world_size)) * 2 * world_size
    padded += [0] * (SEQUENCES - len(padded))
    cu_seqlens = list(accumulate(padded, initial=0))
    places = torch.tensor([o + i for o, n in zip(offsets, real, strict=False) for i in range(n)], device=DEVICE)

    def spread(x):  # the rows of padding hold what no result may depend on
        whole = torch.full((total, *x.shape[1:]), float("nan"), dtype=x.dtype, device=DEVICE)
        return whole.index_copy(0, places, torch.cat([x[:1].expand(before, -1, -1), x]))

    q, k, v, dout = (spread(x) for x in (packing.q, packing.k, packing.v, packing.dout))
    held = [
        torch.tensor(rows_of_rank(cu_seqlens[:-1], padded, total, layout, rank, world_size), device=DEVICE)
        for rank in range(world_size)
    ]
    held = [
        torch.cat([rows, rows.new_tensor(list(range(offsets[-1] + r, total, world_size)))]) if step > 1 else rows
        for r, rows in enumerate(held)
    ]
    gathered = torch.cat(held)
    call = replace(packing.call, layout=Layout(layout), has_lengths=True)
    results = [torch.zeros_like(q), torch.zeros(HEADS, total, device=DEVICE), torch.zeros_like(q)]
    tables = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor(real + [0] * (SEQUENCES - len(real)), dtype=torch.int32, device=DEVICE)
    for rank, rows in enumerate(held):
        sizes = {"sequences": SEQUENCES, "world_size": world_size, "target": launch.target(call.backend, q.device)}
        own = torch.tensor([rank], dtype=torch.int32, device=DEVICE)
        segments, _ = plan.segment_tables(
            launch.run, tables, own, lengths, layout=layout, row_length=total, **sizes
        )  # fmt: skip
        out = lse = dq = None
        mine, dmine = q[rows], dout[rows]
        windows = [
            (head, k[gathered, head : head + stride], v[gathered, head : head + stride])
            for head in range(0, KV_HEADS, stride)
        ]
        arrays = spec(mine), spec(windows[0][1]), spec(windows[0][2])
        problem = make_problem(*arrays, call, kv_heads=KV_HEADS, gluon=False, **sizes)
        for head, k_, v_ in windows:
            out, lse = plan.forward(launch.run, problem, mine, k_, v_, segments, part=Part(head), into=(out, lse))
        strides = {"dout_strides": dmine.stride()[:2]}
        for head, k_, v_ in windows:
            of_rows = plan.backward_rows(launch.run, problem, out, lse, dmine, None, part=Part(head), **strides)
            arguments = launch.run, problem, mine, k_, v_, dmine, of_rows, segments
            dq = plan.backward_queries(*arguments, part=Part(head), into=dq, **strides)
        results[0][rows], results[1][:, rows], results[2][rows] = out, lse, dq
    out, lse, dq = results
    bounds = [(o, o + n) for o, n in zip(offsets, real, strict=False)][1:]
    return [(out[a:b], lse[:, a:b], dq[a:b]) for a, b in bounds]


def product(a, b, dtype=None):
    """Return `a @ b`, each row of which depends on that row of `a` alone; in NumPy's own its place counts too."""
    return (a[:, :, None] * b[None]).sum(1, dtype=dtype)


def spec(x: torch.Tensor) -> ArraySpec:
    return ArraySpec(tuple(x.shape), str(x.dtype).removeprefix("torch."), x.stride()[:2])


@mock.patch.object(np, "matmul", product)  # by which the interpreter multiplies
def differences(seed: int, longest: int) -> list[str]:
    """Return in words what of packing number `seed` depends on how it is dealt out."""
    packing, choose = draw(seed, longest), random.Random(seed)
    expected = attend(packing, 1, Layout.DOCUMENT, KV_HEADS, 0)
    found = []
    for world_size in WORLD_SIZES:
        for layout in Layout:
            stride, before = choose.choice((1, KV_HEADS)), choose.randint(0, longest)
            for document, (ours, theirs) in enumerate(
                zip(attend(packing, world_size, layout, stride, before), expected, strict=True)
            ):
                for name, x, y in zip(("out", "lse", "dq"), ours, theirs, strict=True):
                    if not torch.isfinite(y).all():
                        found.append(f"packing {seed}, document {document}, {name}: not finite")
                    if not torch.equal(x, y):
                        found.append(f"packing {seed}, {world_size} ranks, {layout}, document {document}: {name}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packings", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first packing")
    parser.add_argument("--longest", type=int, default=400 if GPU else 60, help="tokens of a document")
    arguments = parser.parse_args()
    found = []
    for seed in range(arguments.first, arguments.first + arguments.packings):
        found += differences(seed, arguments.longest)
    print(*found[:20], f"{arguments.packings} packings, {len(found)} differences", sep="\n")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
