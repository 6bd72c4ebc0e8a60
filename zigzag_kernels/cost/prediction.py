"""The time that a step takes at given speeds, if nothing but compute and links takes time."""

from dataclasses import dataclass

from .counts import Step, backward, forward
from .machine import Machine


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer on one rank; `efficiency` compares with one GPU that does a share of 1 / W alone."""

    forward: float
    backward: float
    ideal: float

    @property
    def efficiency(self) -> float:
        return self.ideal / (self.forward + self.backward)


def predict(step: Step, machine: Machine, rank: int = 0) -> Prediction:
    """Return how long `step` takes if nothing but compute and links takes time.

    That leaves out the host, and the multiprocessors that communication takes from the attention while both run: a
    prediction is a bound. Every part of an attention is taken to run at the rate of the whole.
    """
    x, ranks, parts = step.arrays(), step.world_size, step.parts
    ahead, back = forward(step, rank), backward(step, rank)
    compute = max(ahead.flops / machine.forward_rate, ahead.hbm_bytes / machine.hbm) / parts
    gradients = max(back.flops / machine.backward_rate, back.hbm_bytes / machine.hbm) / parts
    keys, queries = machine.dkdv_share * gradients, (1 - machine.dkdv_share) * gradients
    ideal = ahead.flops / machine.forward_rate + back.flops / machine.backward_rate
    if step.halo:
        # Rows that need a halo wait for it, and dK/dV travel home beside dQ.
        near = step.halo_scores(rank) / max(step.scores(rank), 1)
        arriving, leaving = machine.neighbours(ranks, x.slot), machine.neighbours(ranks, x.slot_sum)
        both, keys, queries = 2 * compute, 2 * keys, 2 * queries
        return Prediction(
            forward=max((1 - near) * both, arriving) + near * both,
            backward=max((1 - near) * keys, arriving) + near * keys + max(queries, leaving),
            ideal=ideal,
        )
    if step.ring:
        first, arriving, leaving = 0.0, machine.hop(ranks, x.kv), machine.hop(ranks, x.kv_sum)
    else:
        first = arriving = machine.collective(ranks, x.kv / parts)
        leaving = machine.collective(ranks, x.kv_sum / parts)
    return Prediction(
        forward=first + overlap(parts, compute, 0.0, arriving, 0.0),
        backward=first + overlap(parts, keys, queries, arriving, leaving),
        ideal=ideal,
    )


def overlap(parts: int, before: float, after: float, arriving: float, leaving: float) -> float:
    """Return the seconds of `parts` equal parts in turn, each `before` and then `after` seconds of compute.

    One link carries what the next part needs (`arriving`) from the start of a part on, and then what `before` has made
    (`leaving`); the next part begins when all of it is there.
    """
    last = before + max(after, leaving)
    return (parts - 1) * max(before + after, max(before, arriving) + leaving) + last
