"""Launches the kernels for Hopper on random packings, thousands of times, to find hangs and wrong results.

    python -m bench.lab.stress [--launches 10000] [--seconds 120] [--seed 0] [--signature 3]
    python -m bench.lab.stress --seed 0 --packing 17

Each packing is attended three times, forward and backward: by the pair of deterministic kernels, and by the fused one
in any order and in turns. `out` has to be the same bit for bit and the gradients close; every `EVERY`th packing is
compared with the portable kernels as well. Results are NaN before they are written. The host runs ahead of the device.
If a packing takes longer than `HANG_SECONDS`, the process ends with status 2 and says which; the second form plays that
one alone. Ends with status 1 if results differ. A process compiles one kernel after another, for minutes. Several
processes, each with a `--signature` of its own, compile side by side.
"""

import argparse
import collections
import contextlib
import itertools
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

from bench import timing
from bench.arguments import positive
from bench.planning import Planning
from tests.support.cases import Case
from zigzag_torch import launch

# Everything that is compiled into a kernel: few, as each takes some seconds.
SIGNATURES = (
    {"world_size": 2, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"},
    {"world_size": 4, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float16"},
    {"world_size": 1, "heads": 6, "kv_heads": 2, "head_dim": 128, "dtype": "float16"},
    {"world_size": 8, "heads": 4, "kv_heads": 4, "head_dim": 64, "dtype": "bfloat16", "causal": False},
    {"world_size": 8, "heads": 4, "kv_heads": 1, "head_dim": 128, "dtype": "bfloat16"},
    {"world_size": 2, "heads": 4, "kv_heads": 2, "head_dim": 256, "dtype": "bfloat16"},
    {"world_size": 1, "heads": 6, "kv_heads": 2, "head_dim": 192, "dtype": "float16"},
    {"world_size": 2, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": "bfloat16", "window_size": (300, -1)},
    {"world_size": 1, "heads": 8, "kv_heads": 1, "head_dim": 64, "dtype": "float16", "window_size": (1000, -1)},
    {"world_size": 4, "heads": 4, "kv_heads": 4, "head_dim": 128, "dtype": "bfloat16", "attention_chunk": 256},
)
TOKENS, SEQUENCES, PADDING = 4096, 40, 130  # at most, on one rank
AHEAD, EVERY = 16, 20
PORTABLE = "portable kernels"
HANG_SECONDS, HUNG = 120, 2  # compiling the kernels of a signature takes part of it
COUNTED = "attention_forward", "backward_dkdv", "backward_dq", "backward_fused"
# Both of two results may be as wrong as `timing.check` allows. A row is to be right at all: how much a short one is off
# depends on what cancels in it.
BOUNDS = {"as a whole": 2 * timing.CLOSE, "in a row": 0.5}
TINY, SMALLEST_ROW = 1e-3, 1 / 32  # what counts as no size at all: an element, and part of the largest row


class Packing(NamedTuple):
    """One random batch, which `draw` makes from a seed and a number.

    `start`, from 0 to 1, says where in the random arrays the arrays of this batch begin.
    """

    case: Case
    rank: int
    start: float


def signature_of(seed: int, number: int, signatures: Sequence[dict] = SIGNATURES) -> int:
    """Return the index in `signatures` of the packing that `draw` makes from the same numbers."""
    return random.Random(f"{seed} {number}").randrange(len(signatures))


def draw(seed: int, number: int, signatures: Sequence[dict] = SIGNATURES, tokens: int = TOKENS) -> Packing:
    """Return random sequences, from empty to a few times the mean length, equally often of each order of magnitude."""
    generator = random.Random(f"{seed} {number}")
    sizes = signatures[generator.randrange(len(signatures))]
    count, left = _log_uniform(generator, 1, SEQUENCES), generator.randint(1, tokens)
    longest = max(2, 4 * left // count)
    step = 1 if sizes["world_size"] == 1 else 2  # an early and a late chunk
    lengths = []
    for _ in range(count):
        length = 0 if generator.random() < 0.1 else _log_uniform(generator, 1, longest)
        lengths.append(min(-(-length // step), left // step) * step)
        left -= lengths[-1]
    padding = generator.choice((0, generator.randint(1, PADDING))) if any(lengths) else 1
    world_size = sizes["world_size"]
    case = Case(
        name=f"--seed {seed} --packing {number}", lengths=tuple(world_size * x for x in lengths), padding=padding,
        **sizes,
    )  # fmt: skip
    return Packing(case, generator.randrange(world_size), generator.random())


def _log_uniform(generator: random.Random, low: int, high: int) -> int:
    return round(math.exp(generator.uniform(math.log(low), math.log(high))))


def arrays(packing: Packing, pools: dict, tokens: int, device: str) -> tuple[torch.Tensor, ...]:
    """Return inputs like `timing.inputs`, as views of the arrays in `pools`, which are drawn only once."""
    case, start = packing.case, packing.start
    key = case.world_size, case.heads, case.kv_heads, case.head_dim, case.dtype
    if key not in pools:
        sizes = {"heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "dtype": case.dtype}
        longest = Case(name="pool", world_size=1, lengths=(case.world_size * (tokens + PADDING),), **sizes)
        pools[key] = timing.inputs(longest, device)[:4]
    views = []
    for x, rows in zip(pools[key], (case.tokens, case.total, case.total, case.tokens), strict=True):
        views.append(x[int(start * (len(x) - rows)) :][:rows])
    # From pageable memory the host would wait for the copy, and with it for all that came before.
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, pin_memory=device == "cuda")
    return *views, cu_seqlens.to(device, non_blocking=True)


def differences(results, expected) -> torch.Tensor:
    """Return the errors of out, dq, dk and dv, `[4, 2]`: of the whole array, and of its worst row.

    The worst row has the largest error relative to its size.
    """
    found = []
    for result, right in zip(results, expected, strict=True):
        error, size = (x.float().norm(dim=-1) for x in (result.float() - right.float(), right))
        tiny = TINY * math.sqrt(result.shape[-1])
        found.append(error.norm() / (size.norm() + tiny * math.sqrt(error.numel())))
        found.append((error / size.clamp(min=SMALLEST_ROW * size.amax() + tiny)).amax())
    return torch.stack(found).view(-1, len(BOUNDS))


def complaints(found: torch.Tensor, bitwise: bool) -> list[str]:
    """Return a text for each of the `differences` that is too large; with `bitwise`, `out` must have none."""
    return [
        f"{name} is off by {value:.1e} {measure}"
        for name, row in zip(timing.NAMES[: len(found)], found.tolist(), strict=True)
        for (measure, bound), value in zip(BOUNDS.items(), row, strict=True)
        if not value <= (0 if bitwise and name == "out" else bound)  # NaN too
    ]


class Watchdog:
    """Calls `end(HUNG)` with a message if nothing is reported for `seconds`.

    From a thread of its own: behind a kernel that hangs, any call of CUDA may wait for ever, exiting too.
    """

    def __init__(self, seconds: float = HANG_SECONDS, end: Callable[[int], object] = os._exit):
        self.seconds, self.end = seconds, end
        self.state = time.monotonic(), "nothing"
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def report(self, doing: str) -> None:
        """Note progress: if the program hangs from now on, `doing` is the work that hangs."""
        self.state = time.monotonic(), doing

    def _watch(self) -> None:
        while not self.stopped.wait(min(1, self.seconds / 4)):
            since, doing = self.state
            if time.monotonic() - since > self.seconds:
                print(f"\nno progress for {self.seconds:g} s: {doing}", flush=True)
                self.end(HUNG)
                return

    def __enter__(self):
        self.report("start")
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()


def wait_for(event, poll: float = 1e-4) -> None:
    """Wait until the device has reached `event`; the `Watchdog` ends a process that waits too long."""
    while not event.query():
        time.sleep(poll)


class Played(NamedTuple):
    """A packing that is being computed: the names of the compared results, and the host memory for the differences."""

    packing: Packing
    compared: list[str]
    found: torch.Tensor
    event: torch.cuda.Event | None

    def finish(self, watchdog: Watchdog) -> list[str]:
        """Its complaints, when the device has come to its end."""
        watchdog.report(str(self.packing))
        if self.event:
            wait_for(self.event)
        return [
            f"{self.packing}: {against}: {complaint}"
            for against, found in zip(self.compared, self.found, strict=True)
            for complaint in complaints(found, bitwise=PORTABLE not in against)
        ]


class Player:
    """Plays packings under the two settings, and counts `COUNTED` launches of the kernels for Hopper."""

    def __init__(self, device: str = "cuda", backend: str = "triton", tokens: int = TOKENS):
        self.device, self.backend, self.tokens = device, backend, tokens
        self.pools, self.counts = {}, collections.Counter()
        self.forced, self.in_turns = (Planning(ZIGZAG_HOPPER="1", ZIGZAG_TURNS=turns) for turns in "01")
        self.portable = Planning(ZIGZAG_HOPPER="0")

    @contextlib.contextmanager
    def watched(self):
        """Within it launches are counted, and their results are NaN until they are written."""
        run, allocate = launch.run, launch.allocate

        def counted(made, *inputs):
            name = made.kernel.fn.__name__
            if name.startswith(COUNTED) and os.environ["ZIGZAG_HOPPER"] == "1":
                self.counts[name] += 1
            return run(made, *inputs)

        def poisoned(output, like):
            x = allocate(output, like)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        with mock.patch.multiple(launch, run=counted, allocate=poisoned):
            yield

    def start(self, packing: Packing, against_portable: bool) -> Played:
        """Launch all of it; the host waits for nothing but compilation."""
        tensors = arrays(packing, self.pools, self.tokens, self.device)

        def results(deterministic):
            calls = timing.torch_calls(
                packing.case, packing.rank, *tensors, backend=self.backend, deterministic=deterministic
            )
            return calls.results()

        with self.forced:
            pair, fused = results(True), results(False)
        with self.in_turns:
            turns = results(True)
        compared = {"fused and pair": differences(fused, pair), "turns and pair": differences(turns, pair)}
        if against_portable:
            with self.portable:
                compared[f"pair and {PORTABLE}"] = differences(pair, results(True))
        found = torch.stack([*compared.values()])
        if self.device != "cuda":
            return Played(packing, [*compared], found, None)
        found = torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Played(packing, [*compared], found, event)


def play(player: Player, packings, watchdog: Watchdog, enough: Callable[[], bool], tick=lambda: None) -> list[str]:
    """Complaints about `packings`, (packing, whether to compare it with portable kernels), until there are `enough`."""
    pending, said, packing = collections.deque(), [], None

    def finish():
        said.extend(pending[0].finish(watchdog))
        pending.popleft()
        tick()

    try:
        for packing, against_portable in packings:
            if enough():
                break
            watchdog.report(str(pending[0].packing if pending else packing))
            pending.append(player.start(packing, against_portable))
            if len(pending) == AHEAD:
                finish()
        while pending:
            finish()
    except RuntimeError:
        under_way = [played.packing for played in pending]
        print(*said, "an error, under way or begun:", *under_way, packing, sep="\n", flush=True)
        raise
    return said


def main(arguments: list[str] | None = None, player: Player | None = None, **drawing) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launches", type=positive, default=10_000, help="of the forward, dK/dV, dQ and fused kernels")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after these, compilation included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packing", type=int, help="play this one alone")
    parser.add_argument("--signature", type=int, help="play only packings of this entry of SIGNATURES, counted from 0")
    options = parser.parse_args(arguments)
    if player is None:
        timing.require_gpu()
        player = Player()
    start = time.monotonic()
    alone = options.packing is not None
    signatures = drawing.get("signatures", SIGNATURES)
    numbers = iter([options.packing]) if alone else itertools.count()
    if options.signature is not None:
        if alone or options.signature not in range(len(signatures)):
            parser.error(f"--signature: expected 0 to {len(signatures) - 1} without --packing, got {options.signature}")
        numbers = (n for n in numbers if signature_of(options.seed, n, signatures) == options.signature)
    packings = ((draw(options.seed, number, **drawing), alone or number % EVERY == 0) for number in numbers)
    played = 0

    def enough():
        return player.counts.total() >= options.launches or time.monotonic() - start >= options.seconds

    with tqdm(total=options.launches, unit="launch") as bar, Watchdog() as watchdog, player.watched():

        def tick():
            nonlocal played
            played += 1
            bar.update(player.counts.total() - bar.n)

        said = play(player, packings, watchdog, enough, tick)
    if player.backend == "triton" and not all(name.endswith("_hopper") for name in player.counts):
        said.append("no kernel for Hopper serves here")
    print(*said, sep="\n", end="\n" if said else "")
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(player.counts.items()))
    print(
        f"{player.counts.total():,} launches ({counts}) of {played:,} packings in {time.monotonic() - start:.0f} s: "
        f"no hang, {f'{len(said)} complaints' if said else 'no difference'}"
    )
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
