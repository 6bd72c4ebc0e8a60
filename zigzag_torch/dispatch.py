"""Operators whose eager calls bypass PyTorch's dispatcher if nothing else observes them.

The dispatcher, and the layers of `torch.library` around a Python function, take much of the host's time of a call.
Therefore a call bypasses them if no trace, mode, transform or profiler has to see it. Correctness never depends on
that: a call that goes through its operator computes the same.
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
    """The PyTorch operator `name` for `function(*inputs)`, a function that does not modify its inputs."""

    def __init__(self, name: str, function: Callable):
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake
        self._under_transforms: Callable = self.registered

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Register `backward(ctx, *gradients)` as for a `torch.library.custom_op`, and for `torch.func` too."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        rule = {"forward": self.registered, "setup_context": setup_context, "backward": backward}
        namespace = {name: staticmethod(function) for name, function in rule.items()}
        # The gradients of `torch.library` do not support the transforms of `torch.func`; this class does.
        rule_class: Any = type(self.function.__name__, (torch.autograd.Function,), namespace)
        rule_class.generate_vmap_rule = True
        self._under_transforms = rule_class.apply

    def refuse_gradient(self) -> None:
        """Register a gradient that raises an error, for an operator whose gradient would be a second derivative."""
        self.register_autograd(refuse_derivative, setup_context=_save_nothing)

    def __call__(self, *inputs):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        # If autograd has to record the call, it must go through the operator, which has the gradient or raises.
        if goes_straight(tensors) and not records(tensors):
            return self.function(*inputs)
        if torch.compiler.is_compiling() or not transforms_run():
            return self.registered(*inputs)
        return self._under_transforms(*inputs)


def _save_nothing(ctx, inputs, output) -> None:
    pass


def refuse_derivative(ctx, *gradients):
    """Raise `NotImplementedError`: the `jvp`, or the gradient of a gradient, of autograd functions."""
    raise NotImplementedError(UNSUPPORTED_DERIVATIVE)


def transforms_run() -> bool:
    """Return whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()


class _ReverseModeOnly(torch.autograd.Function):
    """Returns views of its tensors, and raises an error if a tensor has a tangent."""

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

    Operators of `torch.library` would drop the tangent, as if the result did not depend on the tensor.
    """
    if getattr(forward_ad, "_current_level", 0) < 0:  # forward mode is not active
        return tensors
    return _ReverseModeOnly.apply(*tensors)


class _FirstDerivatives(torch.autograd.Function):
    """Returns views of its first `n` tensors, which depend on all its tensors, and raises when differentiated."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save_nothing)

    @staticmethod
    def forward(n: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:n])

    backward = staticmethod(refuse_derivative)
    jvp = staticmethod(refuse_derivative)


def first_derivatives_only(backward: Callable) -> Callable:
    """Wrap `backward(ctx, *gradients)` of an autograd function so that differentiating it raises an error.

    Autograd does not see the kernels inside `backward`, so a second derivative would be incomplete. All tensors that
    the gradients depend on must be among `ctx.saved_tensors`.
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
    """Return a decorator that makes a function the `Operator` with this name."""
    return functools.partial(Operator, name)


def goes_straight(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a call with `tensors` may bypass the dispatcher, apart from gradients.

    It may if nothing is active that has to see every operator (a transform, a mode such as checkpointing with a policy,
    a trace, a profiler), and if every tensor is plain memory (no subclass, no lazy negation or zeros).
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
