"""The attention function and the mask function that transformers calls, with the arguments that it passes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from zigzag_kernels.callspec import NO_WINDOW

from ..api import zigzag_attention
from ..batch import Batch
from .packing import batch_of_rows, is_marker

# Arguments that models pass to every attention function, but that do not change the result.
_WITHOUT_EFFECT = (
    {"deterministic", "labels", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch"}
    | {"output_hidden_states", "output_router_logits", "return_dict", "seq_idx", "shift_labels", "use_cache"}
)  # fmt: skip


@dataclass(frozen=True)
class MeshOptions:
    """The options of `use_mesh`, which sets them on every module of a model as `zigzag_mesh`."""

    group: Any = None
    world_size: int = 1
    method: str | None = None
    heads_k_stride: int | None = None
    backend: str | None = None

    def __deepcopy__(self, memo) -> "MeshOptions":
        return self  # a process group cannot be copied; a copy of the model uses the same ranks


_ONE_DEVICE = MeshOptions()


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    zigzag_batch: Batch | None = None,
    zigzag_positions: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer of a transformers model.

    Args:
        query, key, value: `[batch, heads, T, head_dim]` and `[batch, kv_heads, T, head_dim]`; the head_dim of `value`
            may be smaller.
        attention_mask: `[batch, T]`, with padding only at the end of rows, or None.
        sliding_window: number of keys that a row sees, including its own; in an encoder, the number to each side.
        s_aux: attention sinks `[heads]`.
        position_ids, cu_seq_lens_q, cu_seq_lens_k: the packing, if this device holds the whole batch.
        zigzag_batch: the prepared batch; its rows are then `[1, heads, T, head_dim]`.
        zigzag_positions: `[1, T]`, positions for layers whose scores depend on them (`use_mesh` passes them on).

    Returns `[batch, T, heads, head_dim]`, and None in place of attention weights. Raises `NotImplementedError` or
    `ValueError`, which name the module and the argument, for options that the kernels do not support.
    """
    layer = f"{type(module).__name__} {getattr(module, 'layer_idx', '')}".strip()
    options = getattr(module, "zigzag_mesh", _ONE_DEVICE)
    _refuse(layer, module, query, key, dropout, kwargs)
    rows, _, tokens, head_dim = query.shape
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if zigzag_batch is None:
        packing = {"position_ids": position_ids, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        zigzag_batch = _own_batch(layer, options, query, attention_mask, packing, causal)
    else:
        _check_batch(layer, options, zigzag_batch, rows, attention_mask)
    if getattr(module, "attn_temperature_tuning", None) and not getattr(module, "use_rope", True):
        query = _tempered(layer, module, query, zigzag_positions)
    window, chunk = _mask_of(module, causal, sliding_window)
    v_head_dim = value.shape[-1]
    if v_head_dim < head_dim:
        value = pad(value, (0, head_dim - v_head_dim))
    elif v_head_dim > head_dim:
        raise NotImplementedError(f"{layer}: value: expected a head_dim up to {head_dim}, got {v_head_dim}")
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        query, key = query.to(value.dtype), key.to(value.dtype)  # norms and rotary embeddings may have left float32
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = zigzag_attention(
        q,
        k,
        v,
        zigzag_batch,
        group=options.group,
        causal=causal,
        window_size=window,
        attention_chunk=chunk,
        softcap=softcap or 0.0,
        sinks=s_aux,
        softmax_scale=scaling,
        method=options.method,
        heads_k_stride=options.heads_k_stride,
        backend=options.backend,
        layout=zigzag_batch.layout,
    )
    assert isinstance(out, torch.Tensor)
    out = out if v_head_dim == head_dim else out[..., :v_head_dim]
    return out.unflatten(0, (rows, tokens)), None


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset=0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **kwargs,
) -> torch.Tensor | None:
    """Return the padding mask `[batch, T]` for `attention_forward`, or None.

    Packing and windows are passed to `attention_forward` as other arguments. Raises `NotImplementedError` for a cache,
    and for masks that do not consist of padding, packing, windows and chunks.
    """
    is_custom = use_vmap or getattr(mask_function, "__qualname__", "").startswith("or_masks")
    if is_custom:
        raise NotImplementedError(
            "or_mask_function: expected None, as well as and_mask_function and block_sequence_ids, got a mask that the "
            "kernels do not know"
        )
    if isinstance(q_offset, torch.Tensor) or q_offset or kv_offset or kv_length != q_length:
        raise NotImplementedError(
            f"past_key_values: expected None, got a cache ({q_length} queries, {kv_length} keys); generate with "
            "model.set_attn_implementation('sdpa')"
        )
    return attention_mask


def _refuse(
    layer: str, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, dropout: float, kwargs: dict
) -> None:
    """Raise `NotImplementedError` for arguments and models that the kernels do not support."""
    config = getattr(module, "config", None)
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, name, False):  # the mask of cross attention would be mistaken for padding of the rows
            raise NotImplementedError(f"{layer}: {name}: expected False, got True")
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"{layer}: past_key_values: expected as many keys as queries, {query.shape[2]}, got {key.shape[2]}; "
            "generate with model.set_attn_implementation('sdpa')"
        )
    if dropout:
        raise NotImplementedError(f"{layer}: dropout: expected 0 (attention_dropout of the config), got {dropout}")
    if kwargs.pop("output_attentions", False):
        raise NotImplementedError(f"{layer}: output_attentions: expected False, got True")
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown:
        raise NotImplementedError(f"{layer}: {unknown[0]}: expected None, got {type(kwargs[unknown[0]]).__name__}")


def _own_batch(layer: str, options: MeshOptions, query: torch.Tensor, mask, packing: dict, causal: bool) -> Batch:
    """Return the batch that `packing` and `mask` describe; `ValueError` if there are several ranks."""
    if options.world_size > 1:
        raise ValueError(
            f"{layer}: zigzag_batch: expected the batch of {options.world_size} ranks, got None: call "
            "model(**batch.model_kwargs(group))"
        )
    if is_marker(mask):
        raise ValueError(f"{layer}: zigzag_batch: expected the batch, got None, and its attention_mask")
    if causal and mask is None and all(x is None for x in packing.values()):
        raise NotImplementedError(
            f"{layer}: position_ids: expected those of the rows, got None, as its layer does not pass them on: call "
            "zigzag_torch.hf.use_mesh(model, None)"
        )
    rows, _, tokens, _ = query.shape
    return batch_of_rows(rows, tokens, query.device, attention_mask=mask, backend=options.backend, **packing)


def _check_batch(layer: str, options: MeshOptions, batch: Batch, rows: int, attention_mask) -> None:
    """Raise `ValueError` unless `batch` is for the ranks of `options`, and no other argument describes the rows."""
    if batch.world_size != options.world_size:
        raise ValueError(
            f"{layer}: zigzag_batch: expected the batch of {options.world_size} ranks, got one of {batch.world_size}: "
            "call zigzag_torch.hf.use_mesh(model, group)"
        )
    if options.world_size > 1 and rows != 1:
        raise ValueError(f"{layer}: query: expected the rows of a rank as a batch of 1, got {rows}")
    if options.world_size > 1 and not (attention_mask is None or is_marker(attention_mask)):
        shape = tuple(attention_mask.shape)
        raise ValueError(f"{layer}: attention_mask: expected that of ShardedBatch.model_kwargs, got shape {shape}")


def _tempered(layer: str, module, query: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Return `query` scaled by the temperature of its positions.

    Llama 4 has already scaled it by the temperature of its row numbers, which is divided out.
    """
    if positions is None:
        raise NotImplementedError(
            f"{layer}: attn_temperature_tuning: expected a model of zigzag_torch.hf.use_mesh, as its scores depend on "
            "positions, got none"
        )

    def temperature(places: torch.Tensor) -> torch.Tensor:
        steps = torch.floor((places.float() + 1) / module.floor_scale)
        return torch.log1p(steps) * module.attn_scale + 1

    rows = torch.arange(query.shape[2], device=query.device)
    factor = temperature(positions) / temperature(rows)
    return (query * factor[:, None, :, None]).to(query.dtype)


def _mask_of(module: torch.nn.Module, causal: bool, sliding_window: int | None) -> tuple[tuple[int, int], int]:
    """Return (window_size, attention_chunk) of a layer.

    Chunks come from the config, because transformers does not pass them to the attention function.
    """
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    kind = types[index] if types is not None and index is not None and index < len(types) else None
    chunk = config.attention_chunk_size if kind == "chunked_attention" and config is not None else 0
    if kind == "sliding_attention" and sliding_window is None and config is not None:
        sliding_window = config.sliding_window + (not causal)  # the config of an encoder does not count the row itself
    if not sliding_window:
        return NO_WINDOW, chunk
    return (sliding_window - 1, 0 if causal else sliding_window - 1), chunk
