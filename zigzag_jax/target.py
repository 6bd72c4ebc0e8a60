"""`lower_for`, which sets the GPU that kernels are lowered for, if that is not a GPU of this process."""

import re
from contextlib import AbstractContextManager

import jax

# A user context is part of the key of JAX's caches, so a function that was traced outside is traced again inside.
_target = jax.make_user_context(None)


def lower_for(target: str) -> AbstractContextManager[None]:
    """Return a context in which programs are lowered and exported for a GPU that this process does not have.

    In this context the default backend of attention is "triton", and kernels are compiled for `target`. Call
    `jax.jit(step).trace(...).lower(lowering_platforms=("cuda",))` or `jax.export.export(..., platforms=["cuda"])` in
    it; nothing can be executed. It requires JAX's CUDA plugin, which needs no GPU, and Triton without its interpreter.

    Args:
        target: compute capability of the GPU, such as "9.0" for an H100 or H200 and "8.0" for an A100.

    Raises:
        ValueError: a `target` that is not a compute capability.
    """
    if not isinstance(target, str) or not re.fullmatch(r"[1-9]\d*\.\d", target):
        raise ValueError(f"target: expected a compute capability such as '9.0', got {target!r}")
    return _target(target)


def chosen_target() -> str | None:
    """Return the `target` of the `lower_for` around this call, or None without one."""
    return _target.value
