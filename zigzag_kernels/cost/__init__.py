"""The cost of an attention step on a rank, computed from sizes alone: work, bytes, memory and time.

`counts` are exact. `prediction` depends on the speeds of a `machine`, which says which speeds were measured.
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
