"""`register`, which registers the attention with transformers, and `use_mesh`, which prepares a model for a group."""

import functools
import inspect

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from zigzag_kernels.checks import check_method

from ..parallel.agreement import place_in
from .attention import MeshOptions, attention_forward, mask_function
from .packing import batch_of_rows

NAME = "zigzag"
# Layers that mix tokens only by attention. Others, such as recurrent layers, would take a rank's rows for a sequence.
_LAYER_TYPES = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
# Model heads that compute each row by itself. Others look for the last token of a row, or insert images between tokens.
_HEADS = frozenset(("CausalLM", "MaskedLM", "TokenClassification"))
# Rotary embeddings whose frequencies depend on the largest position, which differs between ranks.
_ROPE_OF_THE_LONGEST = frozenset(("dynamic", "longrope"))


def register(name: str = NAME) -> None:
    """Make `name` an attention implementation of transformers, for `attn_implementation=name` and `use_mesh`.

    On one device nothing else is needed: documents are described by `position_ids` that restart at 0, by
    `cu_seq_lens_q` and `cu_seq_lens_k`, or by padding at the end of rows. Options that the kernels do not support raise
    `NotImplementedError` or `ValueError`.
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, mask_function)


def use_mesh(
    model: PreTrainedModel,
    group,
    *,
    method: str | None = None,
    heads_k_stride: int | None = None,
    backend: str | None = None,
    name: str = NAME,
) -> None:
    """Make `model` compute attention over the ranks of `group`; call it before `fully_shard` or `torch.compile`.

    One call is enough. After it, each rank calls `model(**batch.model_kwargs(group))` with its own rows.

    Args:
        model: a model whose attention layers call `AttentionInterface`; it is modified, not copied.
        group: a process group or 1-D DeviceMesh, or None for a single device. With None, the model also accepts packed
            and padded batches in the usual form, and builds their tables once for all layers.
        method, heads_k_stride, backend: as in `zigzag_attention`. A method of None uses the method of each batch.
        name: the name under which the attention implementation is registered.

    Raises `NotImplementedError`, which names the option in the config, for models that mix tokens by anything else than
    attention.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            "model: expected a model of transformers, before DistributedDataParallel or other wrappers, got "
            f"{type(model).__name__}"
        )
    place = place_in(group)
    if method is not None:
        check_method(method)
    register(name)
    config = model.config
    if config.is_encoder_decoder:
        raise NotImplementedError(f"{type(model).__name__}: is_encoder_decoder: expected False, got True")
    if not model._can_set_attn_implementation():
        raise NotImplementedError(
            f"{type(model).__name__}: attn_implementation: expected a model that calls AttentionInterface, got one "
            "with attention of its own"
        )
    model.set_attn_implementation(name)
    if place.world_size > 1:
        _check_ranks(model)
    options = MeshOptions(group, place.world_size, method, heads_k_stride, backend)
    is_new = not hasattr(model, "zigzag_mesh")
    for module in model.modules():
        setattr(module, "zigzag_mesh", options)  # noqa: B010  (modules are annotated to hold tensors alone)
    if is_new:
        model.register_forward_pre_hook(functools.partial(_prepare_inputs, name), with_kwargs=True)


def _check_ranks(model: PreTrainedModel) -> None:
    """Raise `NotImplementedError` for a model that mixes tokens by anything else than attention."""
    name, config = type(model).__name__, model.config.get_text_config()
    head = name.rpartition("For")[2] if "For" in name else None
    if head is not None and head not in _HEADS:
        raise NotImplementedError(
            f"{name}: expected a base model or one for {sorted(_HEADS)} between ranks, got {head}"
        )
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    convolves = any(isinstance(x, torch.nn.Conv1d) and x.kernel_size != (1,) for x in model.modules())
    if others or convolves or getattr(model, "_is_stateful", False):
        kinds = sorted(others) or ("a convolution" if convolves else "recurrent layers")
        raise NotImplementedError(f"{name}: layer_types: expected {sorted(_LAYER_TYPES)} between ranks, got {kinds}")
    if getattr(config, "output_router_logits", False):
        raise NotImplementedError(
            f"{name}: output_router_logits: expected False between ranks, as that loss is over all tokens, got True"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)} & _ROPE_OF_THE_LONGEST
    if kinds:
        raise NotImplementedError(
            f"{name}: rope_parameters: expected frequencies that do not depend on the longest sequence, got rope_type "
            f"{kinds.pop()!r}"
        )


def _prepare_inputs(name: str, model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Check the arguments of `model` before any layer runs, and return them with the batch that all layers use."""
    if model.config._attn_implementation != name:  # the user has set another one since, for example to generate
        return args, kwargs
    options: MeshOptions = model.zigzag_mesh
    kwargs = dict(kwargs)
    if args:
        names = inspect.signature(type(model).forward).parameters
        kwargs |= dict(zip(list(names)[1:], args, strict=False))
    name = type(model).__name__
    if kwargs.get("past_key_values") is not None:
        raise NotImplementedError(
            f"{name}: past_key_values: expected None, got a cache; generate with model.set_attn_implementation('sdpa')"
        )
    kwargs.setdefault("use_cache", False)
    position_ids = kwargs.get("position_ids")
    if kwargs.get("zigzag_batch") is None:
        if options.world_size > 1:
            raise ValueError(
                f"{name}: zigzag_batch: expected the batch of {options.world_size} ranks, got None: call "
                "model(**batch.model_kwargs(group))"
            )
        kwargs["zigzag_batch"] = _own_batch(options, kwargs, position_ids)
    if position_ids is not None:
        kwargs["zigzag_positions"] = position_ids
    return (), kwargs


def _own_batch(options: MeshOptions, kwargs: dict, position_ids: torch.Tensor | None):
    """Return the batch that `kwargs` of a model describe."""
    ids = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if ids is None else ids
    if inputs is None:
        raise ValueError("input_ids: expected token ids [batch, T], or inputs_embeds, got None")
    names = "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k"
    given = {name: kwargs.get(name) for name in names}
    rows, tokens = inputs.shape[:2]
    return batch_of_rows(rows, tokens, inputs.device, position_ids=position_ids, backend=options.backend, **given)
