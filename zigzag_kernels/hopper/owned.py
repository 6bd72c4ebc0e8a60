"""The 64 query rows or keys that a consumer owns: their places in arrays, and functions that load them."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..segments.lookup import chunk_row, key_index, key_position, load_document, load_ranged_segment, load_segment
from ..segments.ranges import keys_of_positions
from .geometry import Geometry
from .releases import load_pointers, struct
from .warps import opaque


@struct
class Strided:
    """An array `[T, heads, head_dim]` that a kernel reads; its last dimension is contiguous."""

    ptr: gl.tensor
    STRIDE_T: gl.constexpr
    STRIDE_H: gl.constexpr

    @gluon.jit
    def from_head(self, head):
        """Return the array without the heads before `head` (int64)."""
        return Strided(ptr=self.ptr + head * self.STRIDE_H, STRIDE_T=self.STRIDE_T, STRIDE_H=self.STRIDE_H)


class Position(NamedTuple):
    """The position of a segment, for ranged masks."""

    first: gl.tensor  # position of its first token in the document
    document: gl.tuple  # the `Document`


@gluon.jit
def load_query_tile(segments_ptr, n_segments, tile, T, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr,
                    RANGED: gl.constexpr):  # fmt: skip
    """Return (`QueryTile` number `tile`, the `Position` of its segment, or nothing unless `RANGED`)."""
    if RANGED:
        queries, first, document = load_ranged_segment(segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M)
        return queries, Position(first=first, document=document)
    else:
        return load_segment(segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M), ()


@struct
class QueryRows:
    """The query rows `[first, end)` of one segment, which one consumer owns."""

    geometry: Geometry
    first: gl.tensor
    end: gl.tensor  # of the segment, exclusive
    q_row: gl.tensor
    diagonal: gl.tensor
    kv_len: gl.tensor
    position: gl.tuple  # the `Position`, or nothing unless the mask is ranged
    MASK: gl.constexpr  # the `Mask`, or None unless it is ranged

    @gluon.jit
    def numbers(self, LAYOUT: gl.constexpr):
        """Return the numbers `[64]` of the rows in their segment, for a tile in `LAYOUT`."""
        return self.first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))

    @gluon.jit
    def anew(self):
        """Return the same rows. The compiler computes their places again, instead of keeping them in registers."""
        return QueryRows(
            geometry=self.geometry, first=opaque(self.first), end=self.end, q_row=self.q_row, diagonal=self.diagonal,
            kv_len=self.kv_len, position=self.position, MASK=self.MASK,
        )  # fmt: skip

    @gluon.jit
    def keys_seen(self, row):
        """Return the number of keys that `row` sees, for one row or for several."""
        return gl.minimum(self.diagonal + row // self.geometry.GROUP + 1, self.kv_len)

    @gluon.jit
    def range_seen(self, row):
        """Return the `KeyRange` of `row`, for one row or for several, where the mask is ranged."""
        position = self.position.first + row // self.geometry.GROUP
        return keys_of_positions(position, self.position.document, self.MASK)

    @gluon.jit
    def real_end(self):
        """Return the end of the rows that are not padding."""
        if self.MASK is None:
            return self.end
        else:
            return gl.minimum(self.end, (self.position.document.real - self.position.first) * self.geometry.GROUP)

    @gluon.jit
    def load(self, array, kv_head, end):
        """Load these rows of a `Strided` array, `[64, BLOCK_D]`: zero from row `end` on.

        Plain loads serve any strides and any number of heads in a group.
        """
        geometry = self.geometry
        GROUP: gl.constexpr = geometry.GROUP
        rows = self.numbers(geometry.LOADS)
        # Packed row r of a segment is token r // GROUP and query head r % GROUP of the KV head.
        tokens, heads = (self.q_row + rows // GROUP).to(gl.int64), kv_head * GROUP + rows % GROUP
        places = tokens * array.STRIDE_T + heads * array.STRIDE_H
        dims = gl.arange(0, geometry.BLOCK_D, gl.SliceLayout(0, geometry.LOADS))
        mask = (rows < end)[:, None] & (dims < geometry.HEAD_DIM)[None, :]
        return gl.load(array.ptr + places[:, None] + dims[None, :], mask=mask, other=0.0)

    @gluon.jit
    def result_places(self, kv_head, HEADS: gl.constexpr, LAYOUT: gl.constexpr):
        """Return (row numbers, int64 offset of each row in a result `[T, HEADS, HEAD_DIM]`)."""
        GROUP: gl.constexpr = self.geometry.GROUP
        rows = self.numbers(LAYOUT)
        tokens = (self.q_row + rows // GROUP).to(gl.int64)
        return rows, (tokens * HEADS + kv_head * GROUP + rows % GROUP) * self.geometry.HEAD_DIM


@gluon.jit
def own_query_rows(warpgroup: gl.constexpr, tile, position, geometry, MASK: gl.constexpr):
    """Return the `QueryRows` of consumer number `warpgroup` in a `QueryTile` at `position`."""
    return QueryRows(
        geometry=geometry,
        first=tile.row + warpgroup * 64,
        end=tile.q_len * geometry.GROUP,
        q_row=tile.q_row,
        diagonal=tile.diagonal,
        kv_len=tile.kv_len,
        position=position,
        MASK=MASK,
    )


@struct
class QueryBuffers:
    """The query rows of all consumers in shared memory, of two heads in turn where a program serves several."""

    buffers: gl.shared_memory_descriptor  # [consumers * HEADS, 64, BLOCK_D]
    HEADS: gl.constexpr  # 1 or 2

    @gluon.jit
    def of(self, warpgroup: gl.constexpr, n):
        """Return the buffer `[64, BLOCK_D]` of consumer number `warpgroup` for head `n` of the program."""
        return self.buffers.index(warpgroup * self.HEADS + n % self.HEADS)


@gluon.jit
def make_query_buffers(geometry):
    """Make the `QueryBuffers` of a program."""
    HEADS: gl.constexpr = 2 if geometry.HEADS_TOGETHER > 1 else 1
    SHAPE: gl.constexpr = [geometry.WARPGROUPS * HEADS, 64, geometry.BLOCK_D]
    return QueryBuffers(buffers=gl.allocate_shared_memory(geometry.dtype, SHAPE, geometry.OWNED_BUFFER), HEADS=HEADS)


@struct
class KeyRows:
    """The keys of one sequence from key `first` on, which one consumer owns; the sequence may end before the 64th."""

    geometry: Geometry
    first: gl.tensor
    tile: gl.tuple  # the `KeyTile` of the program
    slot_rows: gl.tensor
    RANGED: gl.constexpr  # the mask is ranged; its numbers are loaded anew wherever they are used

    @gluon.jit
    def numbers(self, LAYOUT: gl.constexpr):
        """Return the numbers `[64]` of the keys in their sequence, for a tile in `LAYOUT`."""
        return self.first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))

    @gluon.jit
    def positions(self, LAYOUT: gl.constexpr):
        """Return the positions `[64]` of the keys in their document, for a tile in `LAYOUT`; none behind the last."""
        numbers = self.numbers(LAYOUT)
        document = load_document(self.tile)
        # A position behind every limit: no row sees it.
        return gl.where(numbers < document.n_keys, key_position(document, numbers), 0x7FFFFFFF)

    @gluon.jit
    def buffer_rows(self, keys):
        """Return the rows (int64) of `keys` of the sequence in the K/V buffer."""
        if self.RANGED:
            keys += load_document(self.tile).place
        rows = self.tile.kv_row + keys
        if self.geometry.SLOTS > 1:
            kv_chunk = self.tile.kv_chunk
            chunks = keys // kv_chunk
            # Consecutive chunks lie in different slots: a key's row is the first row of its chunk, plus its place in
            # the chunk.
            rows += chunk_row(chunks, kv_chunk, self.slot_rows, self.geometry.SLOTS) - chunks * kv_chunk
        return rows.to(gl.int64)

    @gluon.jit
    def copy(self, k, v, k_buffer, v_buffer):
        """Begin to copy keys of `k` and `v`, `Strided`, into buffers `[64, BLOCK_D]`; see `copy_rows`."""
        self.copy_rows(k, k_buffer)
        self.copy_rows(v, v_buffer)
        async_copy.commit_group()

    @gluon.jit
    def copy_rows(self, array, buffer):
        """Begin to copy keys of a `Strided` array into `buffer [64, BLOCK_D]`, whose other rows become zero.

        Each row is copied by itself, because a tile may cross chunk borders.
        """
        geometry = self.geometry
        keys = self.numbers(geometry.LOADS)
        rows = self.buffer_rows(keys)
        end = self.tile.n_keys
        if self.RANGED:  # padding keys may hold any bits
            document = load_document(self.tile)
            end = key_index(document, document.real)
        dims = gl.arange(0, geometry.BLOCK_D, gl.SliceLayout(0, geometry.LOADS))
        mask = (keys < end)[:, None] & (dims < geometry.HEAD_DIM)[None, :]
        load_pointers(buffer, array.ptr + (rows * array.STRIDE_T)[:, None] + dims[None, :], mask)


@gluon.jit
def own_key_rows(warpgroup: gl.constexpr, tile, slot_rows, geometry, RANGED: gl.constexpr):
    """Return the `KeyRows` of consumer number `warpgroup` in a `KeyTile`."""
    first = tile.first_key + warpgroup * 64
    return KeyRows(geometry=geometry, first=first, tile=tile, slot_rows=slot_rows, RANGED=RANGED)
