"""Predictions of the time that a step takes on a machine, if only kernels and transfers take time."""

from dataclasses import dataclass

from .counts import Step, backward, forward
from .machine import Machine


@dataclass(frozen=True)
class Prediction:
    """The predicted seconds of one layer; `ideal` times are for a rank's share of the work without any transfers.

    Efficiencies are 1 if a step has no rows, and therefore takes no time.
    """

    forward: float
    backward: float
    ideal_forward: float
    ideal_backward: float

    @property
    def forward_efficiency(self) -> float:
        return self.ideal_forward / self.forward if self.forward else 1.0

    @property
    def efficiency(self) -> float:
        seconds = self.forward + self.backward
        return (self.ideal_forward + self.ideal_backward) / seconds if seconds else 1.0


def predict(step: Step, machine: Machine, rank: int = 0) -> Prediction:
    """Return how long `step` takes on `rank` if only kernels and transfers take time.

    A prediction is a lower bound: it leaves out the host, and the multiprocessors that communication takes away from
    the attention while both run. It assumes that every part of an attention runs at the rate of the whole.
    """
    x, ranks, parts = step.split.arrays(), step.world_size, step.parts
    compute, gradients = (seconds / parts for seconds in _compute(step.split, machine, rank))
    keys, queries = machine.dkdv_share * gradients, (1 - machine.dkdv_share) * gradients
    ideal_forward = forward(step, rank).flops / machine.forward_rate
    ideal_backward = backward(step, rank).flops / machine.backward_rate
    whole = step.whole_of(rank)
    # The kernels for whole documents run during the first transfer for the split documents.
    beside, beside_back = (0.0, 0.0) if whole is None else _compute(whole, machine, 0)
    if not step.rows:
        return Prediction(beside, beside_back, ideal_forward, ideal_backward)
    if step.halo:
        # Rows that need a halo wait for the halo; dK/dV of halos travel back while dQ is computed.
        near = step.halo_scores(rank) / max(step.split.scores(rank), 1)
        arriving, leaving = machine.neighbours(ranks, x.slot), machine.neighbours(ranks, x.slot_sum)
        both, keys, queries = 2 * compute, 2 * keys, 2 * queries
        ahead = max(beside + (1 - near) * both, arriving) + near * both
        back = max(beside_back + (1 - near) * keys, arriving) + near * keys + max(queries, leaving)
        return Prediction(ahead, back, ideal_forward, ideal_backward)
    if step.ring:
        # The first ring step has the keys of this rank; the keys for the second step arrive meanwhile.
        arriving, leaving = machine.hop(ranks, x.kv), machine.hop(ranks, x.kv_sum)
        first, first_back = _hidden(beside, compute, arriving), _hidden(beside_back, keys, arriving)
    else:
        arriving, leaving = machine.collective(ranks, x.kv / parts), machine.collective(ranks, x.kv_sum / parts)
        first, first_back = max(arriving, beside), max(arriving, beside_back)
    ahead = first + overlap(parts, compute, 0.0, arriving, 0.0)
    back = first_back + overlap(parts, keys, queries, arriving, leaving)
    return Prediction(ahead, back, ideal_forward, ideal_backward)


def predict_slowest(step: Step, machine: Machine) -> Prediction:
    """Return the prediction of `step` when all ranks wait for the slowest rank, forward and backward.

    The ideal times are means over all ranks, so unequal work lowers the efficiency.
    """
    ranks = [predict(step, machine, rank) for rank in range(step.world_size)]
    return Prediction(
        forward=max(x.forward for x in ranks),
        backward=max(x.backward for x in ranks),
        ideal_forward=sum(x.ideal_forward for x in ranks) / len(ranks),
        ideal_backward=sum(x.ideal_backward for x in ranks) / len(ranks),
    )


def _compute(step: Step, machine: Machine, rank: int) -> tuple[float, float]:
    """Return the seconds of a rank's kernels, (forward, backward), limited by arithmetic or by memory."""
    passes = (forward(step, rank), machine.forward_rate), (backward(step, rank), machine.backward_rate)
    ahead, back = (max(cost.flops / rate, cost.hbm_bytes / machine.hbm) for cost, rate in passes)
    return ahead, back


def _hidden(beside: float, compute: float, arriving: float) -> float:
    """Return how many seconds `beside` adds to a first part of `compute` seconds, during a transfer of `arriving`."""
    return max(beside + compute, arriving) - max(compute, arriving)


def overlap(parts: int, before: float, after: float, arriving: float, leaving: float) -> float:
    """Return the seconds of `parts` equal parts in turn, each with `before` and then `after` seconds of compute.

    One link carries two transfers during each part: from its start, the K/V that the next part needs (`arriving`
    seconds), and then the gradients that `before` computed (`leaving` seconds). The next part begins when both are
    finished.
    """
    last = before + max(after, leaving)
    return (parts - 1) * max(before + after, max(before, arriving) + leaving) + last
