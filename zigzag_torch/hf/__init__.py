"""Attention of Hugging Face transformers models, on one device or over the ranks of a context-parallel group."""

from .registry import register, use_mesh

__all__ = ["register", "use_mesh"]
