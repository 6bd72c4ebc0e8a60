"""Reads the schedule of a program that XLA compiled for GPUs: which transfers are in flight beside each kernel."""

import re
from collections.abc import Iterator

TRANSFER = re.compile(r"%([\w.\-]+) = .* (all-gather|reduce-scatter|collective-permute)-(start|done)\(\S*?%([\w.\-]+)")
KERNEL = re.compile(r" custom-call\(.*zigzag::(attention_forward|backward_dq|backward_dkdv|backward_fused)")


def beside_kernels(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (kernel of attention, transfers in flight beside it) in the order of the schedule.

    Transfers that end without a kernel since they began come as ("none", [transfer]).
    """
    flying: dict[str, bool] = {}  # whether a kernel was beside each transfer
    kinds = {}
    for line in hlo.splitlines():
        if kernel := KERNEL.search(line):
            yield kernel[1], [kinds[name] for name in flying]
            flying = dict.fromkeys(flying, True)
        elif transfer := TRANSFER.search(line):
            name, kind, event, operand = transfer.groups()
            if event == "start":
                flying[name], kinds[name] = False, kind
            elif not flying.pop(operand, True):
                yield "none", [kind]
