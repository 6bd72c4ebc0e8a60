"""When an eager call goes around PyTorch's dispatcher, and operators that do.

The dispatcher, and the layers of `torch.library` around a function written in Python, take more of the host's time than
much of what the function does. A call goes around them if nothing but the function would notice. Correctness never
depends on that: a call that goes through its operator computes the same.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from . import launch

_TENSORS = {torch.Tensor, torch.nn.Parameter}


class Operator:
    """`function(*inputs)` of tensors and constants, none of which it changes, as the operator `name` of PyTorch."""

    def __init__(self, name: str, function: Callable):
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake
        self.register_autograd = self.registered.register_autograd

    def __call__(self, *inputs):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        # The operator has a gradient, or refuses to be differentiated.
        direct = goes_straight(tensors) and not records(tensors)
        return self.function(*inputs) if direct else self.registered(*inputs)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Make the function below it the `Operator` of that name."""
    return functools.partial(Operator, name)


def goes_straight(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the dispatcher, gradients aside, would only call a function of `tensors`.

    Nothing is then in force that hears of every operator (a transform, a mode such as checkpointing with a policy, a
    trace, a profile), and every tensor is in memory as it is (no subclass, no sign or zeros still to be written).
    """
    if torch.compiler.is_compiling() or launch.fast_launch is None:
        return False
    fast = launch.fast_launch
    return not (
        fast.transforms_run()
        or fast.dispatch_modes()
        or fast.function_modes()
        or fast.traced_graph() is not None
        or fast.profiler_runs()
        or not _TENSORS.issuperset(map(type, tensors))
        or any(map(fast.belongs_to_transform, tensors))
        or any(map(fast.is_negated, tensors))
        or any(map(fast.is_zero_tensor, tensors))
    )


def records(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether autograd has to record a call with `tensors`."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False
