"""Times windows, sinks, softcap and documents of real lengths, beside FlashAttention-4 where it is installed.

    python bench/masks.py [--cases NAME ...] [--json FILE]

The shapes come from models: gpt-oss (window 128, sinks), Mistral (window 4,096), Gemma 2 (softcap) and Gemma 3 (window
1,024, head_dim 256). Each result is compared with the result of the other library, or with the reference on a short
batch of the same shape, before it is timed. All gradients are deterministic. TFLOP/s count visible scores only. For one
rank of several, the other library gets K/V already copied into the order in which it reads them.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from tqdm import tqdm

import zigzag_torch
from bench import timing
from bench.run import chosen
from tests.support.cases import DOCUMENTS
from zigzag_kernels import cost
from zigzag_kernels.cost.counts import Mask, visible_scores

OURS, THEIRS = "zigzag_torch", "FlashAttention-4"
CHECKED_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class MaskCase:
    """A batch on one rank, or on one of several that is played alone; `window` counts the token itself."""

    name: str
    lengths: tuple[int, ...] = (16384,)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    max_logits: bool = False
    world_size: int = 1
    layout: str = "document"

    @property
    def rank(self) -> int:
        return 3 * self.world_size // 8

    @property
    def form(self) -> dict:
        """The arguments of `prepare_batch` that describe the layout."""
        return {"layout": self.layout} | ({"row_length": sum(self.lengths)} if self.layout == "row" else {})

    def tokens_of(self, rank: int) -> torch.Tensor:
        """Return which tokens of the whole batch the rows of `rank` are."""
        bounds = torch.tensor([0, *self.lengths]).cumsum(0)
        return zigzag_torch.shard(torch.arange(sum(self.lengths)), bounds, rank, self.world_size, **self.form)

    @cached_property
    def pieces(self) -> list["Piece"]:
        """The runs of successive tokens of one document in the rank's rows, in their order."""
        own, starts = self.tokens_of(self.rank), [*accumulate(self.lengths, initial=0)][:-1]
        breaks = (own.diff() != 1) | torch.isin(own[1:], torch.tensor(starts))
        ends = [*(breaks.nonzero().flatten() + 1).tolist(), len(own)]
        pieces, begin = [], 0
        for end in ends:
            first = int(own[begin])
            start, length = max(x for x in zip(starts, self.lengths, strict=True) if x[0] <= first and x[1])
            pieces.append(Piece(end - begin, first - start, start, length))
            begin = end
        return pieces

    @property
    def window_size(self) -> tuple[int, int]:
        return (-1, -1) if self.window is None else (self.window - 1, 0)

    @property
    def scores(self) -> int:
        """Scores of one query head that the mask leaves to the rank."""
        mask = Mask(window_size=self.window_size)
        return sum(visible_scores(piece.position, piece.rows, piece.length, mask) for piece in self.pieces)


class Piece(NamedTuple):
    """Some successive rows of one document."""

    rows: int
    position: int  # of the first row in its document
    start: int  # of the document in the whole batch
    length: int  # of the document

    @property
    def keys(self) -> int:
        """Keys that the last row sees under a causal mask."""
        return self.position + self.rows


CASES = (
    MaskCase(name="full-d128"),
    MaskCase(name="full-d128-max", max_logits=True),
    MaskCase(name="window4096-d128", window=4096),
    MaskCase(name="window1024-d128", window=1024),
    MaskCase(name="softcap-d128", softcap=50.0),
    MaskCase(name="documents16-window-d128", lengths=(1024,) * 16, window=1024),
    MaskCase(name="full-d64", heads=64, head_dim=64),
    MaskCase(name="sinks-d64", heads=64, head_dim=64, sinks=True),
    MaskCase(name="window128-d64", heads=64, head_dim=64, window=128),
    MaskCase(name="window128-sinks-d64", heads=64, head_dim=64, window=128, sinks=True),
    MaskCase(name="window1024-d256", heads=16, head_dim=256, window=1024),
    MaskCase(name="softcap-d256", heads=16, head_dim=256, softcap=50.0),
    MaskCase(name="eighth-full-d128", lengths=(65536,), world_size=8),
    MaskCase(name="eighth-window1024-d128", lengths=(65536,), world_size=8, window=1024),
    MaskCase(name="eighth-documents-d128", lengths=DOCUMENTS, world_size=8),
    MaskCase(name="eighth-documents-row-d128", lengths=DOCUMENTS, world_size=8, layout="row"),
)


def inputs(case: MaskCase, device: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return (q, gathered k and v, and sinks if there are, that take gradients; dout; cu_seqlens)."""
    generator = torch.Generator(device).manual_seed(0)
    total = sum(case.lengths)
    tokens = total // case.world_size
    shapes = [(tokens, case.heads), (total, case.kv_heads), (total, case.kv_heads), (tokens, case.heads)]
    arrays = [
        torch.randn(*shape, case.head_dim, device=device, generator=generator).to(torch.bfloat16) for shape in shapes
    ]
    *leaves, dout = arrays
    if case.sinks:
        leaves.append(torch.randn(case.heads, device=device, generator=generator).to(torch.bfloat16))
    bounds = torch.tensor([0, *case.lengths]).cumsum(0)
    return [x.requires_grad_() for x in leaves], dout, bounds.to(device, torch.int32)


def ours(case: MaskCase, cu_seqlens: torch.Tensor, backend: str | None = None):
    """Return an attention by this library: `attend(q, k, v, sinks=None) -> out`."""
    batch = zigzag_torch.prepare_batch(cu_seqlens, case.rank, case.world_size, backend=backend, **case.form)

    def attend(q, k, v, sinks=None):
        results = zigzag_torch.zigzag_attention_gathered(
            q, k, v, batch, case.rank, case.world_size, window_size=case.window_size, softcap=case.softcap,
            sinks=sinks, return_max_logits=case.max_logits, backend=backend, layout=case.layout,
        )  # fmt: skip
        return results[0] if case.max_logits else results

    return attend


def theirs(case: MaskCase):
    """Return the same by FlashAttention-4, of the K/V of `keys_of_pieces`; None where it has no such attention."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        return None
    if case.max_logits:
        return None
    window = (None, None) if case.window is None else case.window_size
    rows, keys = [piece.rows for piece in case.pieces], [piece.keys for piece in case.pieces]
    bounds = [torch.tensor([0, *x], device="cuda").cumsum(0).int() for x in (rows, keys)]

    def attend(q, k, v, sinks=None):
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], max_seqlen_q=max(rows), max_seqlen_k=max(keys),
            causal=True, window_size=window, softcap=case.softcap, learnable_sink=sinks, deterministic=True,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return attend


def keys_of_pieces(case: MaskCase, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return `leaves` with the K/V that each piece of the rank's rows sees, copied behind one another."""
    q, k, v, *sinks = leaves
    tokens = torch.cat([case.tokens_of(rank) for rank in range(case.world_size)])
    places = torch.cat([torch.arange(piece.start, piece.start + piece.keys) for piece in case.pieces])
    index = torch.argsort(tokens)[places].to(k.device)
    return [q, *(x.detach()[index].requires_grad_() for x in (k, v)), *sinks]


def gradients(out, leaves, dout):
    return torch.autograd.grad(out, leaves, dout, retain_graph=True)


def check(case: MaskCase, device: str, backend: str | None = None) -> None:
    """`AssertionError` unless a short batch of this shape has the results of the reference."""
    step = 2 * case.world_size
    lengths = (CHECKED_TOKENS // step * step, 10 * step)
    short = replace(case, lengths=lengths, window=case.window and min(case.window, CHECKED_TOKENS // 3))
    leaves, dout, cu_seqlens = inputs(short, device)
    results = []
    for chosen_backend in (backend, "reference"):
        out = ours(short, cu_seqlens, chosen_backend)(*leaves)
        results.append((out, *gradients(out, leaves, dout)))
    for name, got, expected in zip(("out", "dq", "dk", "dv", "dsinks"), *results, strict=False):
        timing.check_close(f"{case.name}: {name}", got, expected)


def measure(case: MaskCase, device: str = "cuda") -> list[dict]:
    """Return a row `{case, implementation, direction, ms, tflops}` for each implementation and direction."""
    check(case, device)
    leaves, dout, cu_seqlens = inputs(case, device)
    samplers, reasons, outs = {}, {}, {}
    for name, attend in ((OURS, ours(case, cu_seqlens)), (THEIRS, theirs(case))):
        if attend is None:
            continue
        given = leaves if name == OURS else keys_of_pieces(case, leaves)
        calls = {"forward": _graphed(partial(attend, *(x.detach() for x in given)))}
        try:
            out = outs[name] = attend(*given)
            calls["backward"] = partial(gradients, out, given, dout)
            calls["backward"]()
        except Exception as error:  # whatever another library raises is a row, not the end of the run
            if name == OURS:
                raise
            reasons[name] = " ".join(str(error).split())[:120]
            calls.pop("backward", None)
        for direction, call in calls.items():
            count = timing.calls_per_round(timing.cuda_sample([call], 2))
            samplers[name, direction] = partial(timing.cuda_sample, [call], count)
    if len(outs) == 2:
        timing.check_close(f"{case.name}: {OURS} beside {THEIRS}", outs[OURS].detach(), outs[THEIRS].detach())
    rows = []
    for (name, direction), times in timing.in_turns(samplers).items():
        ms = statistics.median(times)
        flops = cost.forward_flops if direction == "forward" else cost.backward_flops
        tflops = flops(case.scores, case.heads, case.head_dim) / ms / 1e9
        rows.append({"case": case.name, "implementation": name, "direction": direction, "ms": ms, "tflops": tflops})
    return rows + [{"case": case.name, "implementation": name, "failed": reason} for name, reason in reasons.items()]


def _graphed(call):
    """Return a replay of a CUDA graph of `call`, so that the host's time is not in the result."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay():
        graph.replay()
        return kept

    return replay


def table(rows: list[dict]) -> list[str]:
    """Return a line of Markdown for each case and direction: the other library's time divided by this one's."""
    lines = [f"| case | direction | {OURS}, ms | TFLOP/s | {THEIRS}, ms | times as fast |", "| --- " * 6 + "|"]
    times = {(row["case"], row["direction"], row["implementation"]): row for row in rows if "ms" in row}
    for (name, direction, implementation), row in times.items():
        if implementation == OURS:
            other = times.get((name, direction, THEIRS))
            cells = [f"{other['ms']:.3f}", f"{other['ms'] / row['ms']:.2f}"] if other else ["", ""]
            lines.append(f"| {name} | {direction} | {row['ms']:.3f} | {row['tflops']:.0f} | {' | '.join(cells)} |")
    return lines + [f"{row['case']}: {row['implementation']}: {row['failed']}" for row in rows if "failed" in row]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="NAME", help="shell patterns")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(arguments)
    cases = {case.name: case for case in CASES}
    gpu = timing.require_gpu()
    print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}; medians", flush=True)
    rows = []
    for name in tqdm(chosen(list(cases), options.cases), unit="case"):
        rows += measure(cases[name])
        if options.json:
            options.json.write_text(json.dumps({"gpu": gpu, "rows": rows}, indent=1), encoding="utf-8")
    print("", *table(rows), sep="\n")


if __name__ == "__main__":
    main()
