"""Operators that go around PyTorch's dispatcher in eager calls, where nothing else would notice.

The dispatcher, and the layers of `torch.library` around a function written in Python, take more of the host's time than
a good part of the function itself. A call goes around them if only the function would notice. Correctness never depends
on that: a call that goes through its operator computes the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from zigzag_kernels.derivatives import UNSUPPORTED_DERIVATIVE

from . import launch

_TENSORS = {torch.Tensor, torch.nn.Parameter}


class Operator:
    """The operator `name` of PyTorch for `function(*inputs)`, which changes none of its tensors and constants."""

    def __init__(self, name: str, function: Callable):
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake
        self._under_transforms: Callable = self.registered

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Register `backward(ctx, *gradients)`, as for a `torch.library.custom_op`, also for `torch.func`."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        rule = {"forward": self.registered, "setup_context": setup_context, "backward": backward}
        namespace = {name: staticmethod(function) for name, function in rule.items()}
        # The gradients of `torch.library` do not support the transforms of `torch.func`; this class does.
        rule_class: Any = type(self.function.__name__, (torch.autograd.Function,), namespace)
        rule_class.generate_vmap_rule = True
        self._under_transforms = rule_class.apply

    def refuse_gradient(self) -> None:
        """Register a gradient that raises: the operator is a gradient itself, so it would be a second derivative."""
        self.register_autograd(refuse_derivative, setup_context=_save_nothing)

    def __call__(self, *inputs):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        # The operator has a gradient, or refuses to be differentiated.
        if goes_straight(tensors) and not records(tensors):
            return self.function(*inputs)
        if torch.compiler.is_compiling() or not transforms_run():
            return self.registered(*inputs)
        return self._under_transforms(*inputs)


def _save_nothing(ctx, inputs, output) -> None:
    pass


def refuse_derivative(ctx, *gradients):
    """Refuse as the `jvp`, or as the gradient of a gradient, of an autograd function."""
    raise NotImplementedError(UNSUPPORTED_DERIVATIVE)


def transforms_run() -> bool:
    """Return whether a transform of `torch.func` is in force."""
    return torch._C._are_functorch_transforms_active()


class _ReverseModeOnly(torch.autograd.Function):
    """Returns views of its tensors, and refuses tangents of them."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save_nothing)

    @staticmethod
    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients

    jvp = staticmethod(refuse_derivative)


def refuse_tangents(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `tensors`; `NotImplementedError` if forward-mode differentiation has given one of them a tangent.

    Operators of `torch.library` would drop it, and the result seem not to depend on the tensor.
    """
    if getattr(forward_ad, "_current_level", 0) < 0:  # no forward mode is in force
        return tensors
    return _ReverseModeOnly.apply(*tensors)


class _FirstDerivatives(torch.autograd.Function):
    """Returns views of its first `n` tensors, which depend on all of them in a way that has no derivative."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save_nothing)

    @staticmethod
    def forward(n: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:n])

    backward = staticmethod(refuse_derivative)
    jvp = staticmethod(refuse_derivative)


def first_derivatives_only(backward: Callable) -> Callable:
    """Make `backward(ctx, *gradients)` of an autograd function refuse to be differentiated itself.

    A second derivative would lack what autograd does not see inside of it. All tensors that the gradients depend on
    must be among `ctx.saved_tensors`.
    """

    @functools.wraps(backward)
    def refusing(ctx, *cotangents):
        with torch.no_grad():
            gradients = backward(ctx, *cotangents)
        if not torch.is_grad_enabled():
            return gradients
        sources = [x for x in (*ctx.saved_tensors, *cotangents) if x is not None and x.requires_grad]
        if not sources:
            return gradients
        present = [x for x in gradients if x is not None]
        guarded = iter(_FirstDerivatives.apply(len(present), *present, *sources))
        return tuple(None if x is None else next(guarded) for x in gradients)

    return refusing


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
