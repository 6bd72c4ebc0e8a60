"""Kernels in Triton for every GPU of compute capability 8.0 or newer, and for Triton's interpreter."""
