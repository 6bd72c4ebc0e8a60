"""The way from a `Problem` to the launches that solve it, for every framework.

Front ends call the functions of `steps`; the other modules find or make the launches of a step.
"""

from ..launch import Launch, Output
from .operation import WHOLE, Part
from .planner import Planned, Planner, use_planner
from .steps import (
    Run,
    add_halo_rows,
    backward,
    backward_keys,
    backward_queries,
    backward_rows,
    backward_sinks,
    backward_window,
    forward,
    fuses_windows,
    halo_buffer,
    halo_rows,
    plan_step,
    segment_tables,
    sent_rows,
)

__all__ = [
    "WHOLE",
    "Launch",
    "Output",
    "Part",
    "Planned",
    "Planner",
    "Run",
    "add_halo_rows",
    "backward",
    "backward_keys",
    "backward_queries",
    "backward_rows",
    "backward_sinks",
    "backward_window",
    "forward",
    "fuses_windows",
    "halo_buffer",
    "halo_rows",
    "plan_step",
    "segment_tables",
    "sent_rows",
    "use_planner",
]
