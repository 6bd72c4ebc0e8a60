"""The constants of one kernel: its tile shape, and the layouts and byte counts that follow from that shape."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .releases import aggregate


@gluon.constexpr_function
def product_layout(columns):
    """Return the layout of a product with `columns` columns in a warpgroup, whose four warps share the rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@aggregate
class Geometry:
    """The shape of one kernel: each consumer, a warpgroup, owns 64 rows, and blocks of other rows stream past.

    The forward and dQ own query rows and stream keys; dK/dV owns keys and streams query rows.
    """

    dtype: gl.constexpr  # of q, k, v and dout
    SLOTS: gl.constexpr
    GROUP: gl.constexpr
    HEAD_DIM: gl.constexpr
    BLOCK_D: gl.constexpr  # HEAD_DIM rounded up to a power of two
    OWNED: gl.constexpr  # rows that all consumers of a program own
    STREAMED: gl.constexpr  # rows of a block that streams past
    WIDE: gl.constexpr  # whether head_dim is above 128: shared memory and registers then hold less of everything
    STAGES: gl.constexpr  # buffers for each kind of block
    HEADS_TOGETHER: gl.constexpr  # KV heads that a program serves, one after the other
    WARPGROUPS: gl.constexpr  # consumers
    BLOCK_BYTES: gl.constexpr  # of one block
    SCORES: gl.constexpr  # layout [64, STREAMED] of scores, and of the gradient of the probabilities
    SUMS: gl.constexpr  # layout [64, BLOCK_D] of the sums over blocks
    OPERAND: gl.constexpr  # layout [64, STREAMED] of P or dS that a product with SUMS takes from registers
    LOADS: gl.constexpr  # layout [64, BLOCK_D] of rows that come by plain loads or copies, 16 bytes a thread
    OWNED_BUFFER: gl.constexpr  # layout [64, BLOCK_D] in shared memory of the rows that a consumer owns

    @gluon.constexpr_function
    def __init__(
        self, dtype, SLOTS, GROUP, HEAD_DIM, BLOCK_D, *, OWNED, STREAMED, STAGES, HEADS_TOGETHER, SHARED=1
    ):  # fmt: skip
        """SHARED consumers work on the same 64 rows."""
        self.dtype = gl.constexpr(dtype)
        self.SLOTS = gl.constexpr(SLOTS)
        self.GROUP = gl.constexpr(GROUP)
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.OWNED = gl.constexpr(OWNED)
        self.STREAMED = gl.constexpr(STREAMED)
        self.WIDE = gl.constexpr(BLOCK_D > 128)
        self.STAGES = gl.constexpr(STAGES)
        self.HEADS_TOGETHER = gl.constexpr(HEADS_TOGETHER)
        self.WARPGROUPS = gl.constexpr(OWNED // 64 * SHARED)
        self.BLOCK_BYTES = gl.constexpr(STREAMED * BLOCK_D * dtype.primitive_bitwidth // 8)
        self.SCORES = gl.constexpr(product_layout(STREAMED))
        self.SUMS = gl.constexpr(product_layout(BLOCK_D))
        # A product leaves a thread two adjacent columns, and takes them as an operand in the same places: P needs no
        # exchange between threads.
        self.OPERAND = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=product_layout(BLOCK_D), k_width=2))
        # Eight elements of 16 bits are the widest load of a thread; a warp reads whole rows.
        self.LOADS = gl.constexpr(gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0]))
        self.OWNED_BUFFER = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype))
