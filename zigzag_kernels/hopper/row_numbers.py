"""The order of numbers of query rows, such as their lse, in shared memory, and a function that reads them.

Scores of keys by rows leave a thread two adjacent columns of each eight. In the order of rows, a thread would read the
numbers of two columns with one instruction; in the order here it reads the numbers of four. Every read takes a cycle
of shared memory, which the operands of products need.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .geometry import product_layout


@gluon.jit
def rows_of_places(places):
    """Return the row of a block whose number lies at each of `places`.

    Of every 16 rows, the four numbers that one thread reads lie next to each other.
    """
    return (places & ~15) | ((places & 2) << 2) | ((places & 12) >> 1) | (places & 1)


@gluon.constexpr_function
def _read_layout(rows):
    """Return the layout `[rows]`, by place, in which the threads of a warpgroup read numbers."""
    # A linear layout lists where each bit of the register, the thread of the warp and the warp moves an element.
    groups = [[16 << bit] for bit in range((rows // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout([[1], [2], *groups], [[4], [8], [0], [0], [0]], [[0], [0]], [], [rows])


@gluon.jit
def read_numbers(buffer):
    """Read `buffer [rows]`, whose numbers lie in the order of `rows_of_places`, in the layout of a row of the scores.

    `rows` is a power of two of at least 16.
    """
    ROWS: gl.constexpr = buffer.shape[0]
    LAYOUT: gl.constexpr = _read_layout(ROWS)
    SPLIT: gl.constexpr = [ROWS // 16, 4, 2, 2]
    FLAT: gl.constexpr = [ROWS]
    SCORES: gl.constexpr = product_layout(ROWS)
    by_row = buffer.load(LAYOUT).reshape(SPLIT).permute((0, 2, 1, 3)).reshape(FLAT)
    return gl.convert_layout(by_row, gl.SliceLayout(0, SCORES), assert_trivial=True)
