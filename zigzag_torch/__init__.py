"""Zigzag attention for PyTorch: context-parallel attention over packed batches in one fused Triton launch.

`__all__` is the public surface. Every other name in this package may change without notice.
"""

from zigzag_kernels import __version__
from zigzag_kernels.documents import DocumentPlan, plan_documents

from . import flops as flops
from .api import zigzag_attention, zigzag_attention_gathered
from .batch import Batch
from .compat.flags import ZigzagConfig
from .compat.grouped import (
    compute_kv_slices_for_groups,
    execute_grouped_attention,
    rearrange_kv_from_zigzag_to_contiguous,
    split_q_by_zigzag_chunk_index,
)
from .compat.llama3 import (
    replace_grouped_attention_with_fused_triton_v2,
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
)
from .compat.ring_flash_attn import patch_ring_flash_attn
from .compat.two_chunks import fused_zigzag_llama3_flash_attn_forward_v2
from .data import ShardedBatch, ZigzagCollator, shard_documents, unshard_group
from .loss import token_mean_loss
from .padding import pad_to_zigzag, unpad
from .prepare import prepare_batch
from .profiling import profile_report
from .reference import merge_partials
from .segment_ids import cu_seqlens_from_position_ids, cu_seqlens_from_segment_ids
from .shard import local_cu_seqlens, position_ids, shard, unshard
from .validate import validate

__all__ = [
    "Batch",
    "DocumentPlan",
    "ShardedBatch",
    "ZigzagCollator",
    "ZigzagConfig",
    "__version__",
    "compute_kv_slices_for_groups",
    "cu_seqlens_from_position_ids",
    "cu_seqlens_from_segment_ids",
    "execute_grouped_attention",
    "fused_zigzag_llama3_flash_attn_forward_v2",
    "local_cu_seqlens",
    "merge_partials",
    "pad_to_zigzag",
    "patch_ring_flash_attn",
    "plan_documents",
    "position_ids",
    "prepare_batch",
    "profile_report",
    "rearrange_kv_from_zigzag_to_contiguous",
    "replace_grouped_attention_with_fused_triton_v2",
    "shard",
    "shard_documents",
    "split_q_by_zigzag_chunk_index",
    "token_mean_loss",
    "unpad",
    "unshard",
    "unshard_group",
    "validate",
    "zigzag_attention",
    "zigzag_attention_gathered",
    "zigzag_llama3_flash_attn_varlen_func",
    "zigzag_llama3_flash_attn_varlen_kvpacked_func",
    "zigzag_llama3_flash_attn_varlen_qkvpacked_func",
]
