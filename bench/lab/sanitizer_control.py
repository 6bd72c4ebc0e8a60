"""Kernels with a known verdict, to test compute-sanitizer: each uses one construct of the kernels for Hopper.

A report on a correct kernel is a false alarm, which the same tool may raise for `zigzag_kernels/hopper` too. If a tool
does not report the wrong kernel, it cannot see such races. Each kernel adds up tiles `[ROWS, ROWS]`:

- `control_partitions`: two partitions of warps each add up tiles from global memory, with no barriers except the ones
  in `gl.warp_specialize`.
- `control_tma`: the copy engine brings tiles into a ring of two stages with mbarriers, by a descriptor made on the
  device; a single partition does everything.
- `control_stores`: a producer partition fills the ring by plain stores, two consumers read it by plain loads.
- `control_both`: the same filled by the copy engine.
- `control_wgmma`: the same, and the tensor cores read the stages.
- `control_race`: as `control_stores`, but the consumers do not wait for a tile: wrong.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from zigzag_kernels.hopper.releases import load_box
from zigzag_torch.launch import with_scratch

TILES, PROGRAMS = 5, 2
ROWS = gl.constexpr(64)
STAGES = gl.constexpr(2)
FLAGS = "PARTITIONS", "RING", "TMA", "WGMMA", "WAIT"
VARIANTS = {
    "partitions": (True, False, False, False, True),
    "tma": (False, True, True, False, True),
    "stores": (True, True, False, False, True),
    "both": (True, True, True, False, True),
    "wgmma": (True, True, True, True, True),
    "race": (True, True, False, False, False),
}


def constants(name: str) -> dict:
    """The constexprs of a variant."""
    return {"NAME": name, "TILES": TILES} | dict(zip(FLAGS, VARIANTS[name], strict=True))


def launch() -> set[str]:
    """Launch every variant, and return the names of the kernels; `AssertionError` if a correct one is wrong."""
    rows = int(ROWS)
    # Integers so small that every product and sum is exact.
    x, own = (torch.randint(-3, 4, (n * rows, rows), device="cuda").half() for n in (TILES, 1))
    tiles = x.float().view(TILES, rows, rows)
    for name in VARIANTS:
        out = torch.full((PROGRAMS, 2, rows, rows), float("nan"), device="cuda")
        with_scratch(_control[(PROGRAMS,)], x, own, out, **constants(name))
        expected = (own.float() @ tiles if name == "wgmma" else tiles).sum(0)
        assert name == "race" or torch.equal(out, expected.expand_as(out)), f"{name} is wrong"
    return {f"control_{name}" for name in VARIANTS}


@gluon.jit
def _places(LAYOUT: gl.constexpr):
    rows, columns = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    return rows[:, None] * ROWS + columns[None, :]


@gluon.jit
def _fill(x_ptr, desc, ring, full, empty, i, TMA: gl.constexpr):
    """Tile `i` into its stage, when that is empty."""
    stage = i % STAGES
    hopper.mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
    if TMA:
        hopper.mbarrier.expect(full.index(stage), ROWS * ROWS * 2)
        load_box(desc, [i * ROWS, 0], full.index(stage), ring.index(stage))
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
        ring.index(stage).store(gl.load(x_ptr + i * ROWS * ROWS + _places(LAYOUT)))
        hopper.mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _add(total, x_ptr, own, ring, full, empty, i, RING: gl.constexpr, WGMMA: gl.constexpr, WAIT: gl.constexpr):  # noqa: PLR0917  (a partition of a kernel)
    """`total` and tile `i`, which is left for the next one to come."""
    LAYOUT: gl.constexpr = total.type.layout
    stage = i % STAGES
    if RING:
        if WAIT:
            hopper.mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if WGMMA:
            total = hopper.warpgroup_mma(own, ring.index(stage), total, is_async=True)
            total = hopper.warpgroup_mma_wait(0, [total])
        else:
            total += ring.index(stage).load(LAYOUT).to(gl.float32)
        hopper.mbarrier.arrive(empty.index(stage), count=1)
    else:
        total += gl.load(x_ptr + i * ROWS * ROWS + _places(LAYOUT)).to(gl.float32)
    return total


@gluon.jit
def _producer(x_ptr, desc, ring, full, empty, TMA: gl.constexpr, TILES: gl.constexpr):
    for i in range(TILES):
        _fill(x_ptr, desc, ring, full, empty, i, TMA)


@gluon.jit
def _consumer(  # noqa: PLR0917  (a partition of a kernel)
    x_ptr, out_ptr, own, ring, full, empty, LAYOUT: gl.constexpr, RING: gl.constexpr, WGMMA: gl.constexpr,
    WAIT: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    total = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    for i in range(TILES):
        total = _add(total, x_ptr, own, ring, full, empty, i, RING, WGMMA, WAIT)
    gl.store(out_ptr + _places(LAYOUT), total)


@gluon.jit(repr=lambda call: f"control_{call.constants['NAME']}")
def _control(  # noqa: PLR0917  (a partition of a kernel)
    x_ptr,  # [TILES * ROWS, ROWS] float16
    own_ptr,  # [ROWS, ROWS] float16: what the tensor cores multiply each tile with
    out_ptr,  # [PROGRAMS, 2, ROWS, ROWS] float32
    NAME: gl.constexpr, TILES: gl.constexpr, PARTITIONS: gl.constexpr, RING: gl.constexpr, TMA: gl.constexpr,
    WGMMA: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], gl.float16)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    out_ptr += gl.program_id(0) * 2 * ROWS * ROWS
    ring = gl.allocate_shared_memory(gl.float16, [STAGES, ROWS, ROWS], SHARED)
    own = gl.allocate_shared_memory(gl.float16, [ROWS, ROWS], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    desc = x_ptr
    if TMA:
        desc = hopper.tma.make_tensor_descriptor(x_ptr, [TILES * ROWS, ROWS], [ROWS, 1], [ROWS, ROWS], SHARED)
    if WGMMA:
        own.store(gl.load(own_ptr + _places(LOAD)))
    if RING:
        for stage in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(stage), 1)
            hopper.mbarrier.init(empty.index(stage), 2 if PARTITIONS else 1)
    hopper.fence_async_shared()
    LAYOUT: gl.constexpr = MMA if WGMMA else LOAD
    if PARTITIONS:
        gl.warp_specialize(
            [
                (_consumer, (x_ptr, out_ptr, own, ring, full, empty, LAYOUT, RING, WGMMA, WAIT, TILES)),
                (_consumer, (x_ptr, out_ptr + ROWS * ROWS, own, ring, full, empty, LAYOUT, RING, WGMMA, WAIT, TILES)),
                (_producer, (x_ptr, desc, ring, full, empty, TMA, TILES if RING else 0)),
            ],
            [4, 4],
            [128, 24],
        )  # fmt: skip
    else:
        total = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
        for i in range(TILES):
            _fill(x_ptr, desc, ring, full, empty, i, TMA)
            total = _add(total, x_ptr, own, ring, full, empty, i, RING, WGMMA, WAIT)
        gl.store(out_ptr + _places(LAYOUT), total)
        gl.store(out_ptr + ROWS * ROWS + _places(LAYOUT), total)
