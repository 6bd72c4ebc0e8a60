"""Zigzag attention for JAX: context-parallel attention over packed batches in one fused Triton launch.

The names in `__all__` are public. The modules behind them are not, and may change.
"""

from zigzag_kernels import __version__
from zigzag_kernels.documents import DocumentPlan, plan_documents

from .api import zigzag_attention, zigzag_attention_gathered
from .batch import Batch
from .launch import export_disabled_checks
from .loss import token_mean_loss
from .mesh import make_zigzag_attention
from .padding import pad_to_zigzag, unpad
from .prepare import prepare_batch
from .reference import merge_partials
from .segment_ids import cu_seqlens_from_position_ids, cu_seqlens_from_segment_ids
from .segmented import segmented_attention
from .segmented_batch import SegmentedBatch, prepare_segments
from .shard import local_cu_seqlens, position_ids, shard, unshard
from .target import lower_for
from .validate import validate

__all__ = [
    "Batch",
    "DocumentPlan",
    "SegmentedBatch",
    "__version__",
    "cu_seqlens_from_position_ids",
    "cu_seqlens_from_segment_ids",
    "export_disabled_checks",
    "local_cu_seqlens",
    "lower_for",
    "make_zigzag_attention",
    "merge_partials",
    "pad_to_zigzag",
    "plan_documents",
    "position_ids",
    "prepare_batch",
    "prepare_segments",
    "segmented_attention",
    "shard",
    "token_mean_loss",
    "unpad",
    "unshard",
    "validate",
    "zigzag_attention",
    "zigzag_attention_gathered",
]
