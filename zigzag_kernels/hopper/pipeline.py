"""What the kernels for Hopper share: the walk over a sequence's keys block by block, and the copies that bring them.

Keys are walked downwards from the last one that a tile sees, and a block ends with its chunk. Blocks come by the copy
engine (TMA) into *stages*, buffers that are used in turn: block `i` uses stage `i % STAGES`. Two kinds of block come
side by side (K and V, or Q and dO). A barrier for each kind and stage says that it is full; one a stage that both are
empty, because every arrival at a barrier costs a consumer two barriers of its own warps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..segments.lookup import chunk_row


def _renamed(module, name: str, before: str):
    return getattr(module, name, None) or getattr(module, before)


SINCE_3_8 = gl.constexpr(hasattr(hopper.tma, "async_load"))
thread_barrier = _renamed(gl, "barrier", "thread_barrier")  # in Triton 3.7
load_box = _renamed(hopper.tma, "async_load", "async_copy_global_to_shared")  # in 3.8
load_pointers = _renamed(async_copy, "async_load", "async_copy_global_to_shared")  # in 3.8
CONSUMER_REGISTERS = {2: 240, 3: 160, 4: 112}  # of a thread, by the number of consumers: all that producers leave


@builtin
def specialize_warps(consumer, arguments, warpgroups, *others, _semantic=None, _generator=None):
    """Run `consumer(n, *arguments)` in each of `warpgroups` warpgroups, side by side with `others`.

    Those are (function, arguments, number of warps), which have few registers.
    """
    consumers, others = warpgroups.value, [(function, given, warps.value) for function, given, warps in others]
    partitions = [(consumer, gl.tuple([gl.constexpr(n), *arguments])) for n in range(consumers)]
    partitions += [(function, given) for function, given, _ in others]
    warps = [4] * (consumers - 1) + [warps for *_, warps in others]
    registers = [CONSUMER_REGISTERS[consumers]] * (consumers - 1) + [24] * len(others)
    return _semantic.warp_specialize(partitions, warps, registers, _generator)


@gluon.jit
def top_block(seen, kv_chunk, SLOTS: gl.constexpr, BLOCK_N: gl.constexpr):
    """(chunk, start, number of this block and all below) for the block that ends with key `seen - 1`.

    In one slot there are no chunks: keys follow each other.
    """
    if SLOTS == 1:
        blocks = (seen + BLOCK_N - 1) // BLOCK_N
        chunk = blocks * 0
        start = (blocks - 1) * BLOCK_N
    else:
        chunk = gl.maximum(seen - 1, 0) // gl.maximum(kv_chunk, 1)
        inner = (seen - chunk * kv_chunk + BLOCK_N - 1) // BLOCK_N
        blocks = chunk * ((kv_chunk + BLOCK_N - 1) // BLOCK_N) + inner
        start = chunk * kv_chunk + (inner - 1) * BLOCK_N
    return chunk, start, blocks


@gluon.jit
def walk_down(chunk, start, kv_chunk, SLOTS: gl.constexpr, BLOCK_N: gl.constexpr):
    """(chunk, start) of the block below."""
    below = start - BLOCK_N
    if SLOTS > 1:
        crossed = below < chunk * kv_chunk
        chunk = gl.where(crossed, chunk - 1, chunk)
        below = gl.where(crossed, chunk * kv_chunk + (kv_chunk - 1) // BLOCK_N * BLOCK_N, below)
    return chunk, below


@gluon.jit
def block_place(chunk, start, kv_row, kv_chunk, SLOTS: gl.constexpr):
    """(slot, row in it) of the block of keys that begins at `start`, for `key_descriptor`."""
    if SLOTS == 1:
        return start * 0, kv_row + start
    else:
        row = kv_row + chunk_row(chunk, kv_chunk, 0, SLOTS) + start - chunk * kv_chunk
        return chunk_row(chunk, 0, 1, SLOTS), row


@gluon.jit
def next_place(
    i, blocks, chunk, start, head, seen, kv_row, kv_chunk, SLOTS: gl.constexpr, BLOCK_N: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr,
):  # fmt: skip
    """(chunk, start, head, slot, row) of block `i`, from those of the one before: the block below, or the top block of
    the next head, when `i` is a multiple of `blocks`."""
    chunk, start = walk_down(chunk, start, kv_chunk, SLOTS, BLOCK_N)
    if HEADS_TOGETHER > 1:
        top_chunk, top_start, _ = top_block(seen, kv_chunk, SLOTS, BLOCK_N)
        below = i - (head + 1) * blocks < 0
        chunk = gl.where(below, chunk, top_chunk)
        start = gl.where(below, start, top_start)
        head = gl.where(below, head, head + 1)
    slot, row = block_place(chunk, start, kv_row, kv_chunk, SLOTS)
    return chunk, start, head, slot, row


@gluon.jit
def key_descriptor(
    ptr, seen, kv_row, kv_chunk, slot_rows, SLOTS: gl.constexpr, HEAD_DIM: gl.constexpr, STRIDE_T: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, HEADS_TOGETHER: gl.constexpr,
):  # fmt: skip
    """Descriptor of the keys of one sequence, [slot, row, head * head_dim], for boxes [1, BLOCK_N, BLOCK_D].

    Rows end with the sequence in every slot, in one slot with the keys that are seen: what a box has behind them is
    zero, never another sequence's or padding, which may be NaN.
    """
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, BLOCK_D], ptr.dtype.element_ty)
    end = kv_row + (seen if SLOTS == 1 else 2 * kv_chunk)
    return hopper.tma.make_tensor_descriptor(
        ptr, [SLOTS, end, HEADS_TOGETHER * HEAD_DIM], [slot_rows.to(gl.int64) * STRIDE_T, STRIDE_T, 1],
        [1, BLOCK_N, BLOCK_D], LAYOUT,
    )  # fmt: skip


@gluon.jit
def opaque(x):
    """`x`, int32, of which the compiler knows nothing.

    A loop that begins with it stays apart from a first trip written before it: merged, they ran 15 % slower.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, arrivals: gl.constexpr):
    """A barrier for each stage, which as many `arrivals` complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(barriers.index(i), arrivals)
    return barriers


@gluon.jit
def make_stages(shape: gl.constexpr, dtype: gl.constexpr, arrivals: gl.constexpr):
    """(buffers, full) of `shape[0]` stages, that as many `arrivals` make full."""
    buffers = gl.allocate_shared_memory(dtype, shape, gl.NVMMASharedLayout.get_default_for(shape[1:], dtype))
    return buffers, make_barriers(shape[0], arrivals)


@gluon.jit
def wait_turn(empty, i, STAGES: gl.constexpr):
    """Wait until the consumers have left what was in the stage of block `i`; the first round does not wait."""
    hopper.mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)


@gluon.jit
def wait_block(full, i, STAGES: gl.constexpr):
    """Wait for block `i`."""
    hopper.mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)


@gluon.jit
def block_of(buffers, i, STAGES: gl.constexpr):
    """The stage of block `i`, a box of three dimensions, as rows `[_, BLOCK_D]`."""
    SHAPE: gl.constexpr = [buffers.shape[1] * buffers.shape[2], buffers.shape[3]]
    return buffers.index(i % STAGES).reshape(SHAPE)


@gluon.jit
def load_block(desc, place, full, buffers, i, STAGES: gl.constexpr, BYTES: gl.constexpr):
    """Bring block `i` from `place` into its stage, which is empty."""
    stage = i % STAGES
    hopper.mbarrier.expect(full.index(stage), BYTES)
    load_box(desc, place, full.index(stage), buffers.index(stage))


@gluon.jit
def issue_scores(rows, buffers, full, i, zero, STAGES: gl.constexpr):
    """Issue the products of `rows` and those of block `i`, when it is there."""
    wait_block(full, i, STAGES)
    return hopper.warpgroup_mma(rows, block_of(buffers, i, STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def make_columns(BLOCK_N: gl.constexpr):
    """The numbers of a block's keys in shared memory, for `hide`."""
    columns = gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.allocate_shared_memory(gl.int32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]), columns)


@gluon.jit
def blocks_to_hide(blocks, seen_by_all, kv_chunk, SLOTS: gl.constexpr, BLOCK_N: gl.constexpr):
    """(how many blocks from the top on have keys that not all rows see; the first ragged one, or -1).

    Where chunks are not whole blocks, the last block of each runs over its end and is ragged.
    """
    whole = gl.maximum(seen_by_all, 0)
    if SLOTS == 1:
        return blocks - whole // BLOCK_N, -1
    else:
        length = gl.maximum(kv_chunk, 1)
        per_chunk = (length + BLOCK_N - 1) // BLOCK_N
        below = whole // length
        masked = blocks - below * per_chunk - (whole - below * length) // BLOCK_N
        return masked, gl.where(length % BLOCK_N == 0, -1, blocks % per_chunk)


@gluon.jit
def hide(
    x, INSTEAD: gl.constexpr, columns_smem, limit, i, blocks, masked, ragged, kv_chunk, SLOTS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(`x` of block `i`, with INSTEAD for keys that a row does not see or behind the chunk's end; next ragged block).

    Whole blocks skip this, and where the block is in the sequence is computed in here alone. The numbers of its keys
    are read in here too: in registers they would take one for every four keys during the loop.
    """
    if (i < masked) | (i == ragged):
        left = blocks - 1 - i
        start = left * BLOCK_N
        if SLOTS > 1:
            per_chunk = (kv_chunk + BLOCK_N - 1) // BLOCK_N
            chunk = left // per_chunk
            start = chunk * kv_chunk + (left - chunk * per_chunk) * BLOCK_N
            limit = gl.minimum(limit, (chunk + 1) * kv_chunk)
            ragged = gl.where(i == ragged, ragged + per_chunk, ragged)
        columns = columns_smem.load(gl.SliceLayout(0, x.type.layout))
        x = gl.where((start + columns)[None, :] < limit[:, None], x, INSTEAD)
    return x, ragged


@gluon.jit
def row_places(
    row, q_row, kv_head, HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr
):
    """`[64]` rows of a segment from `row` on, and where each begins in `[T, HEADS, HEAD_DIM]` (int64)."""
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    return rows, ((q_row + rows // GROUP).to(gl.int64) * HEADS + kv_head * GROUP + rows % GROUP) * HEAD_DIM


@gluon.jit
def load_tile(ptr, places, inside, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows that begin `places` elements behind `ptr`: `[len(places), BLOCK_D]` in LAYOUT, zero where not `inside`
    and behind HEAD_DIM."""
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    return gl.load(ptr + places[:, None] + dims[None, :], mask=mask, other=0.0)


@gluon.jit
def load_queries(
    ptr, row, last_row, q_row, kv_head, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    STRIDE_T: gl.constexpr, STRIDE_H: gl.constexpr,
):  # fmt: skip
    """`[64, BLOCK_D]` rows of a segment from `row` on, zero from `last_row` on, for a store to shared memory: by plain
    loads, whatever the strides and the number of heads in a group are."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    tokens, heads = (q_row + rows // GROUP).to(gl.int64), kv_head * GROUP + rows % GROUP
    return load_tile(ptr, tokens * STRIDE_T + heads * STRIDE_H, rows < last_row, HEAD_DIM, BLOCK_D, LAYOUT)


@gluon.constexpr_function
def result_layout(BLOCK_D, dtype):
    """Layout of `[64, BLOCK_D]` results of `dtype` on their way out: 16 bytes of a row side by side in a thread, 64 in
    four. Rows are in the warps that have them of a product, so that numbers stay in their warp on the way from there.
    """
    wide = 128 // dtype.primitive_bitwidth
    own, pair = wide.bit_length() - 1, wide.bit_length() + 1
    columns = [[0, 2**i] for i in range(BLOCK_D.bit_length() - 1)]
    rows = [[2**i, 0] for i in range(6)]
    registers = [*columns[:own], rows[3], *columns[pair:]]
    return gl.DistributedLinearLayout(registers, [*columns[own:pair], *rows[:3]], rows[4:], [], [64, BLOCK_D])


@gluon.jit
def store_tile(ptr, places, inside, x, HEAD_DIM: gl.constexpr, ACCUMULATE: gl.constexpr):
    """Write, or with `ACCUMULATE` add, the rows of `x` that are `inside`, in the layout that `places` is a slice of."""
    LAYOUT: gl.constexpr = places.type.layout.parent
    dims = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + places[:, None] + dims[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    if ACCUMULATE:
        x = gl.convert_layout(x, LAYOUT) + gl.load(ptrs, mask=mask, other=0.0)
    gl.store(ptrs, gl.convert_layout(x.to(ptr.dtype.element_ty), LAYOUT), mask=mask)
