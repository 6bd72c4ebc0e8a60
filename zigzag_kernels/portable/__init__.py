"""Kernels in Triton for every GPU of compute capability 8.0 or newer, and for Triton's interpreter.

There is one file per kernel: `forward`, then the backward pass: `delta`, `dkdv`, `dq`. They implement FlashAttention-2
(Dao, arXiv:2307.08691) over the tables of `zigzag_kernels.segments`, which also explains the words that they use.

Kernels pass these nouns to their helpers: `Constants` (all that a kernel is compiled for), `KeyRows`, `Keys` and
`RowPlaces` (where rows are in memory), `KeyRange`, `VisibleKeys` and `SeeingRows` (the mask), `RunningSoftmax`.
"""
