"""Registration with transformers, and the preparation of one model for the ranks of a group."""

import functools
import inspect

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from zigzag_kernels.checks import check_method

from ..parallel.agreement import place_in
from .attention import MeshOptions, attention_forward, mask_function
from .packing import batch_of_rows

NAME = "zigzag"
# Layers that mix tokens by attention alone; others, such as recurrent ones, would see a rank's rows as a sequence.
_LAYER_TYPES = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
# Heads that compute each row by itself; others look for the last token of a row, or put images between tokens.
_HEADS = frozenset(("CausalLM", "MaskedLM", "TokenClassification"))
# Rotary embeddings that choose frequencies by the largest position, which differs between ranks.
_ROPE_OF_THE_LONGEST = frozenset(("dynamic", "longrope"))


def register(name: str = NAME) -> None:
    """Make `name` an attention implementation of transformers, for `attn_implementation=name` and `use_mesh`.

    On one device this is all: `position_ids` that restart at 0, `cu_seq_lens_q` and `cu_seq_lens_k`, or padding at the
    end of rows say where documents are. Options that the kernels do not support raise `NotImplementedError` or
    `ValueError`.
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
    """Let `model` attend between the ranks of `group`: call it once, before `fully_shard` or `torch.compile`.

    From then on the model takes batches by `model(**batch.model_kwargs(group))`, each rank its own rows.

    Args:
        model: its attention layers call `AttentionInterface`; it is not copied.
        group: a process group or 1-D DeviceMesh, or None for this device alone. Then the model also takes packed and
            padded batches as they are, and makes their tables once for all layers.
        method, heads_k_stride, backend: as in `zigzag_attention`. A method of None takes the method of each batch.
        name: the attention implementation, which is registered.

    Raises `NotImplementedError`, with the name in the config, for models that compute across tokens elsewhere too.
    """
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
    """Raise `NotImplementedError` for a model that computes something else across tokens than attention."""
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
    """Return the arguments of `model` with the batch that all layers attend to; checks them before any layer runs."""
    if model.config._attn_implementation != name:  # it was set to another since, such as to generate
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
