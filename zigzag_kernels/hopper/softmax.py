"""The online softmax of the forward: the statistics of 64 rows, block by block, and the results that follow."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .releases import struct

# The score of hidden keys, below all real scores. It is finite, so that a row whose first blocks are all hidden gives
# no NaN; the first key that the row sees scales their sums to zero. It is a power of two, so that it stays exact when
# scaled: otherwise the fused multiplication and subtraction of the maximum would leave a huge rounding error.
HIDDEN = gl.constexpr(-(2.0**100))


@struct
class RowResult:
    """The log-sum-exp of each row, its largest score, and the factor that turns its sum over V into its output."""

    factor: gl.tensor  # [64]
    lse2: gl.tensor  # [64], base 2
    largest2: gl.tensor  # [64], base 2


@struct
class Softmax:
    """The online softmax (Milakov and Gimelshein, arXiv:1805.02867) of the rows, base 2, after the blocks so far."""

    maximum: gl.tensor  # [64], of the scaled scores
    total: gl.tensor  # [64], of the exponentials
    SCALE_LOG2: gl.constexpr

    @gluon.jit
    def add(self, scores):
        """Add a block: return (its exponentials, the factor for earlier sums, the next `Softmax`)."""
        # Scores stay unscaled: the scale is a part of the one multiply-add before each exponential.
        maximum = gl.maximum(self.maximum, gl.max(scores, 1) * self.SCALE_LOG2)
        rescale = gl.exp2(self.maximum - maximum)
        p = gl.exp2(scores * self.SCALE_LOG2 - maximum[:, None])
        total = self.total * rescale + gl.sum(p, 1)
        return p, rescale, Softmax(maximum=maximum, total=total, SCALE_LOG2=self.SCALE_LOG2)

    @gluon.jit
    def add_sinks(self, sinks):
        """Return the `Softmax` after adding `sinks [64]`, base 2, to the total of each row."""
        maximum = gl.maximum(self.maximum, sinks)
        total = self.total * gl.exp2(self.maximum - maximum) + gl.exp2(sinks - maximum)
        return Softmax(maximum=maximum, total=total, SCALE_LOG2=self.SCALE_LOG2)

    @gluon.jit
    def blind(self):
        """Return `[64]` true for rows that see no key, provided that every block was hidden from them."""
        # The maximum of a row that sees no key is HIDDEN, scaled. A row of NaN scores has the same maximum, but a NaN
        # total.
        return (self.maximum < HIDDEN * self.SCALE_LOG2 * 0.5) & (self.total == self.total)

    @gluon.jit
    def finish(self, blind, largest2, kv_len, factor):
        """Return the `RowResult` of rows whose blocks have all been added. Sums over V still lack `factor`."""
        lse2 = gl.where(blind, float("-inf"), self.maximum + gl.log2(self.total))
        factor = gl.where(blind, 0.0, factor / self.total)
        largest2 = gl.where(blind, float("-inf"), largest2)
        if kv_len < 0:  # invalid tables: every result becomes NaN
            lse2 = lse2 + float("nan")
            factor = factor + float("nan")
        return RowResult(factor=factor, lse2=lse2, largest2=largest2)


@gluon.jit
def empty_softmax(SCALE_LOG2: gl.constexpr, ROWS: gl.constexpr):
    """Return the `Softmax` of rows before their first block."""
    maximum = gl.full([64], float("-inf"), gl.float32, ROWS)
    return Softmax(maximum=maximum, total=gl.zeros([64], gl.float32, ROWS), SCALE_LOG2=SCALE_LOG2)


@gluon.jit
def first_softmax(scores, SCALE_LOG2: gl.constexpr):
    """Return (the exponentials of the first block, the `Softmax` of this block)."""
    maximum = gl.max(scores, 1) * SCALE_LOG2
    p = gl.exp2(scores * SCALE_LOG2 - maximum[:, None])
    return p, Softmax(maximum=maximum, total=gl.sum(p, 1), SCALE_LOG2=SCALE_LOG2)


@gluon.jit
def fold(result, before):
    """Merge `result` with earlier results of the same rows, whose log-sum-exp is `before`, base 2.

    Return (the merged `RowResult`, the factor for the earlier output).
    """
    largest = gl.maximum(result.lse2, before)
    largest = gl.where(largest == float("-inf"), 0.0, largest)
    # Each output is an average by its own total: together they weigh as much as their share of both totals.
    now, then = gl.exp2(result.lse2 - largest), gl.exp2(before - largest)
    sums = now + then
    none = sums == 0.0
    sums = gl.where(none, 1.0, sums)
    lse2 = gl.where(none, float("-inf"), largest + gl.log2(sums))
    return RowResult(factor=result.factor * (now / sums), lse2=lse2, largest2=result.largest2), then / sums


@gluon.constexpr_function
def _multiply_unless_one(N):
    """Return PTX that multiplies N numbers by N factors, unless every factor of the warp is 1.

    A thread has two rows of a product, and its registers have two numbers of one row, then two of the other: the first
    and the third factor are the factors of both rows.
    """
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * N + i};" for i in range(N))
    return (
        f"{{ .reg .pred other, any; setp.neu.f32 other, ${2 * N}, 0f3F800000;"
        f" setp.neu.or.f32 other, ${2 * N + 2}, 0f3F800000, other;"
        f" vote.sync.any.pred any, other, 0xffffffff; @!any bra DONE; {products} DONE: }}"
    )


@gluon.constexpr_function
def _registers(N):
    """Return the constraints of the PTX of `_multiply_unless_one`: results in the place of the numbers, and factors."""
    return ",".join(["=f"] * N + [str(i) for i in range(N)] + ["f"] * N)


@gluon.jit
def rescale_sums(acc, rescale):
    """Return `acc [64, BLOCK_D]`, a product's sums, times `rescale [64]`.

    The maximum of most rows rises in a few blocks only. In all others the factor is 1, and the products are skipped
    where it is 1 for all rows of a warp. NaN is another factor than 1.
    """
    N: gl.constexpr = acc.shape[1] // 2  # registers of a thread: 64 rows are divided among 128 threads
    factors, _ = gl.broadcast(rescale[:, None], acc)
    return gl.inline_asm_elementwise(
        _multiply_unless_one(N), _registers(N), [acc, factors], gl.float32, is_pure=True, pack=N
    )
