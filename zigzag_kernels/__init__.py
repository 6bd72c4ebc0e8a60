"""Zigzag attention kernels and the framework-free plan that launches them; users import zigzag_torch or zigzag_jax."""

__version__ = "0.2.0"
