"""Activation checkpointing that keeps the results of attention, which would cost most to compute again."""

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .. import autograd as autograd  # defines the operators


def keep_attention():
    """Return the contexts with which a checkpointed layer keeps only `out` and `lse` of attention.

    The backward pass then computes q, k and v again, but not attention. This function is a `context_fn` of
    `torch.utils.checkpoint`: pass `gradient_checkpointing_enable` of a model the `gradient_checkpointing_kwargs`
    `{"use_reentrant": False, "context_fn": keep_attention}`. Attention of the backend "reference" is not kept.
    """
    operators = torch.ops.zigzag
    return create_selective_checkpoint_contexts(
        [operators.attention_forward.default, operators.parallel_forward.default]
    )
