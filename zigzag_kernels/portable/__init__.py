"""Kernels in Triton for every GPU of compute capability 8.0 or newer, and for Triton's interpreter.

There is one file for each kernel: `forward`, then `delta`, `dkdv` and `dq` for the backward pass. They implement
FlashAttention-2 (Dao, arXiv:2307.08691) over the tables of `zigzag_kernels.segments`, whose docstring defines
*segment*, *row*, *key*, *slot* and *window*. After the backward pass, `sinks` computes the gradient of the sinks, and
`halo` copies and adds rows for method "halo".

Kernels pass these structs to their helpers: `Constants` (everything that a kernel is compiled for), `KeyRows`, `Keys`
and `RowPlaces` (the places of rows in memory), `KeyRange`, `VisibleKeys` and `SeeingRows` (the mask), `RunningSoftmax`.
"""
