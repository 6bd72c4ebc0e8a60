"""The way of results out of a kernel: their layout in registers, and stores that may add to earlier results."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .releases import struct


@gluon.constexpr_function
def result_layout(BLOCK_D, dtype):
    """Return the layout in which results `[64, BLOCK_D]` of `dtype` are stored.

    A thread has 16 adjacent bytes of a row, and four threads 64 bytes. Each row is in the warp that has the row of a
    product, so that no number leaves its warp when a product changes to this layout. Above head_dim 128 a thread has
    four adjacent numbers, and results change their layout as float32: numbers of 16 bits would need shared memory for
    that, which is full.
    """
    wide = 4 if BLOCK_D > 128 else 128 // dtype.primitive_bitwidth
    own, pair = wide.bit_length() - 1, wide.bit_length() + 1
    # A linear layout lists where each bit of the register, the thread of the warp and the warp moves an element: [row,
    # column].
    columns = [[0, 2**i] for i in range(BLOCK_D.bit_length() - 1)]
    rows = [[2**i, 0] for i in range(6)]
    registers = [*columns[:own], rows[3], *columns[pair:]]
    return gl.DistributedLinearLayout(registers, [*columns[own:pair], *rows[:3]], rows[4:], [], [64, BLOCK_D])


@gluon.jit
def cast_result(x, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Return `x` as `dtype` in LAYOUT, a `result_layout`."""
    if x.shape[1] > 128:
        return gl.convert_layout(x, LAYOUT).to(dtype)
    else:
        return gl.convert_layout(x.to(dtype), LAYOUT)


@gluon.jit
def store_tile(ptr, places, inside, x, HEAD_DIM: gl.constexpr, ACCUMULATE: gl.constexpr):
    """Write the rows of `x` that are `inside`, or add them with `ACCUMULATE`; `places` is a slice of the layout."""
    LAYOUT: gl.constexpr = places.type.layout.parent
    dims = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + places[:, None] + dims[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    if ACCUMULATE:
        x = gl.convert_layout(x, LAYOUT) + gl.load(ptrs, mask=mask, other=0.0)
    gl.store(ptrs, cast_result(x, ptr.dtype.element_ty, LAYOUT), mask=mask)


@struct
class KeyGradients:
    """The arrays of dK and dV, `[kv_tokens, KV_HEADS, head_dim]`, with the rows of the K/V buffer."""

    dk_ptr: gl.tensor
    dv_ptr: gl.tensor
    KV_HEADS: gl.constexpr
    SOFTMAX_SCALE: gl.constexpr
    ACCUMULATE: gl.constexpr

    @gluon.jit
    def store(self, own, head, n, dk, dv):
        """Write dK, not yet scaled, and dV of the `KeyRows` `own`, for KV head `head + n` of the window."""
        self.store_values(own, head + n, dv)
        self.store_keys(own, head + n, dk)

    @gluon.jit
    def store_values(self, own, head, dv):
        """Write dV of the `KeyRows` `own`, for KV head `head` of the window."""
        self._store(self.dv_ptr, own, head, dv, 1.0)

    @gluon.jit
    def store_keys(self, own, head, dk):
        """Write dK, not yet scaled, of the `KeyRows` `own`, for KV head `head` of the window."""
        self._store(self.dk_ptr, own, head, dk, self.SOFTMAX_SCALE)

    @gluon.jit
    def _store(self, ptr, own, head, x, SCALE: gl.constexpr):
        HEAD_DIM: gl.constexpr = own.geometry.HEAD_DIM
        LAYOUT: gl.constexpr = result_layout(own.geometry.BLOCK_D, self.dk_ptr.dtype.element_ty)
        keys = own.numbers(LAYOUT)
        # Results are dense, with the rows of the K/V buffer, whatever the strides of K and V are.
        places = (own.buffer_rows(keys) * self.KV_HEADS + head) * HEAD_DIM
        valid = gl.where(own.tile.poison, float("nan"), 1.0)
        store_tile(ptr, places, keys < own.tile.n_keys, x * (valid * SCALE), HEAD_DIM, self.ACCUMULATE)
