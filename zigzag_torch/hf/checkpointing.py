"""Activation checkpointing that keeps the results of attention, which cost most to compute again."""

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .. import autograd as autograd  # defines the operators


def keep_attention():
    """Return the contexts with which a checkpointed layer keeps `out` and `lse` of attention, and nothing else.

    The backward pass then computes q, k and v again, and attends no second time. It is the `context_fn` of
    `torch.utils.checkpoint`: give `gradient_checkpointing_enable` of a model the `gradient_checkpointing_kwargs`
    `{"use_reentrant": False, "context_fn": keep_attention}`. The backend "reference" is computed again all the same.
    """
    operators = torch.ops.zigzag
    return create_selective_checkpoint_contexts(
        [operators.attention_forward.default, operators.parallel_forward.default]
    )
