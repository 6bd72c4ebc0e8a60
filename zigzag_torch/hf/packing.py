"""Batches for one device, made from the arguments with which transformers models describe packing and padding."""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..batch import Batch
from ..prepare import prepare_batch
from ..segment_ids import cu_seqlens_from_position_ids
from ..validate import validate

# The batches that exist, by one of the tensors that describe them. All layers of a model get the same tensors, so the
# first layer makes the batch, and later layers find it here: building tables costs kernel launches.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_marker(attention_mask) -> bool:
    """Return whether `attention_mask` is the empty mask of `ShardedBatch.model_kwargs`."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and attention_mask.numel() == 0


def batch_of_rows(
    rows: int,
    tokens: int,
    device: torch.device,
    *,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    backend: str | None = None,
) -> Batch:
    """Return the batch of `rows` rows of `tokens` tokens each, all of them on this device.

    Args:
        position_ids: `[rows, tokens]` or `[1, tokens]` integers; a document begins where the position is 0.
        attention_mask: `[rows, tokens]`, 1 for tokens and 0 for padding at the end of a row.
        cu_seq_lens_q, cu_seq_lens_k: `[N + 1]` integers, equal offsets of documents that are packed into one row.

    Offsets take precedence over `position_ids`, as in transformers. Raises `ValueError` for positions that do not
    describe whole documents, for padding that is not at the end of a row, for offsets together with padding, and for
    different offsets of queries and keys. The host reads the values, once for all layers that get the same tensor.
    """
    if not (attention_mask is None or isinstance(attention_mask, torch.Tensor)):
        kind = type(attention_mask).__name__
        raise NotImplementedError(f"attention_mask: expected None or padding [{rows}, {tokens}], got {kind}")
    given = [x for x in (cu_seq_lens_q, attention_mask, position_ids) if x is not None]
    if not given or torch.compiler.is_compiling() or given[0].is_inference():
        return _make(rows, tokens, device, position_ids, attention_mask, cu_seq_lens_q, cu_seq_lens_k, backend)
    others = cu_seq_lens_k, position_ids
    facts = rows, tokens, device, backend, *((id(x), x._version) for x in (*given, *others) if x is not None)
    known = _known.get(given[0])
    if known is None or known[0] != facts:
        batch = _make(rows, tokens, device, position_ids, attention_mask, cu_seq_lens_q, cu_seq_lens_k, backend)
        # The entry keeps the other tensors alive, so that their ids stay unique. It must not keep its own key alive:
        # the key would then never be freed.
        known = facts, batch, [x for x in others if x is not given[0]]
        _known[given[0]] = known
    return known[1]


def _make(rows, tokens, device, position_ids, attention_mask, cu_seq_lens_q, cu_seq_lens_k, backend) -> Batch:
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        return _flattened(rows, tokens, attention_mask, cu_seq_lens_q, cu_seq_lens_k, backend)
    if attention_mask is not None:
        if attention_mask.ndim != 2 or tuple(attention_mask.shape) != (rows, tokens):
            raise NotImplementedError(
                f"attention_mask: expected None or padding [{rows}, {tokens}], got shape {tuple(attention_mask.shape)}"
            )
        if torch.compiler.is_compiling() or not bool(attention_mask.all()):
            return _padded(attention_mask.bool(), position_ids, backend)
    if position_ids is None:
        return prepare_batch(torch.arange(rows + 1, dtype=torch.int32, device=device) * tokens, backend=backend)
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != tokens:
        raise NotImplementedError(
            f"position_ids: expected shape (1, {tokens}) or ({rows}, {tokens}), got {tuple(position_ids.shape)}"
        )
    cu_seqlens = cu_seqlens_from_position_ids(position_ids.to(device).expand(rows, tokens))
    if not torch.compiler.is_compiling() and int(cu_seqlens[-1]) < 0:
        raise ValueError(
            "position_ids: expected documents whose positions begin at 0 and grow by 1, got others; rows that are "
            "dealt out to ranks need zigzag_batch, as ShardedBatch.model_kwargs gives it"
        )
    return prepare_batch(cu_seqlens, backend=backend)


def _flattened(rows, tokens, attention_mask, cu_seq_lens_q, cu_seq_lens_k, backend) -> Batch:
    """Return the batch of one packed row, from the offsets that transformers passes to FlashAttention."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        missing = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise ValueError(f"{missing}: expected the same offsets as for the other one, got None")
    if rows != 1 or attention_mask is not None:
        shape = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(f"cu_seq_lens_q: expected one row without attention_mask, got {rows} and a mask {shape}")
    if not torch.compiler.is_compiling():
        if cu_seq_lens_k is not cu_seq_lens_q and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
            raise ValueError("cu_seq_lens_k: expected the offsets of cu_seq_lens_q, got others; there is no cache")
        validate(cu_seq_lens_q, 1, tokens)
    return prepare_batch(cu_seq_lens_q.clone(), backend=backend)  # the batch must not keep the caller's tensor alive


def _padded(real: torch.Tensor, position_ids: torch.Tensor | None, backend: str | None) -> Batch:
    """Return the batch of rows that are one document followed by padding; `real [rows, tokens]` marks its tokens."""
    rows, tokens = real.shape
    places = torch.arange(tokens, device=real.device)
    lengths = real.sum(1, dtype=torch.int32)
    at_the_end = (real == (places < lengths[:, None])).all()
    positions = real.new_ones(()) if position_ids is None else ((position_ids == places) | ~real).all()
    if not torch.compiler.is_compiling():
        if not bool(at_the_end):
            raise ValueError(
                "attention_mask: expected padding at the end of each row (padding_side='right'), got some elsewhere"
            )
        if not bool(positions):
            raise ValueError("position_ids: expected one document in each row of attention_mask, got packed ones")
    lengths = torch.where(at_the_end & positions, lengths, -1)  # attention is NaN if the host could not check
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=real.device) * tokens
    return prepare_batch(cu_seqlens, lengths=lengths, backend=backend)
