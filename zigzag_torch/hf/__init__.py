"""Zigzag attention for Hugging Face transformers models, on one device or over the ranks of a group."""

from .checkpointing import keep_attention
from .registry import register, use_mesh
from .trainer import ZigzagTrainerMixin

__all__ = ["ZigzagTrainerMixin", "keep_attention", "register", "use_mesh"]
