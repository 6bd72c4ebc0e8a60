"""The cost of a step for a rank, from sizes alone: work, bytes, memory, and time at given speeds.

`counts` are exact, `prediction` rests on the speeds of a `machine`, which says which of them were measured.
"""

from .counts import (
    Arrays,
    Mask,
    Pass,
    Step,
    backward,
    backward_flops,
    causal_scores,
    extra_memory,
    forward,
    forward_flops,
    unmasked_scores,
    visible_scores,
)
from .machine import Machine
from .prediction import Prediction, predict, predict_slowest

__all__ = [
    "Arrays",
    "Machine",
    "Mask",
    "Pass",
    "Prediction",
    "Step",
    "backward",
    "backward_flops",
    "causal_scores",
    "extra_memory",
    "forward",
    "forward_flops",
    "predict",
    "predict_slowest",
    "unmasked_scores",
    "visible_scores",
]
