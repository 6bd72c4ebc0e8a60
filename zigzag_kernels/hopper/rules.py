"""Rules that say which problems the Hopper kernels can run, and where they should beat the portable kernels."""

import math

from ..checks import DTYPE_BYTES
from ..family import read_switch
from ..heuristics import (
    FEW_ROWS,
    LONG_WALK,
    MANY_ROWS,
    MANY_TURNS,
    MODERATE_KEYS,
    MODERATE_KEYS_DQ,
    NARROW_KEYS,
    SHORT_CHUNK_KEYS,
    SHORT_CHUNK_KEYS_DKDV,
    SMALL_FUSED_KEYS,
    SMALL_HEAD_DIM,
    SMALL_LONG_WALK,
    SMALL_TURNS_SIDE_BY_SIDE,
    TURNS_SIDE_BY_SIDE,
    VERY_LONG_WALK,
    VERY_NARROW_KEYS,
    WIDE_WINDOW,
)
from ..modes import LengthClass, Operation
from ..problem import Problem

TARGET = "9.0"
TRITON = "3.6.", "3.7.", "3.8.", "3.9."  # releases that the kernels ran with: Gluon changes from release to release
MIN_HEAD_DIM, MAX_HEAD_DIM = 40, 256  # smaller ones would fill less than half of a tile
MAX_HEAD_DIM_FUSED = 128  # above it one program does not hold dK, dV and dQ
TURNS = "ZIGZAG_TURNS"
"""Environment variable: tiles of keys take turns never (0) or wherever they can (1)."""
FUSED_KEYS = 128  # of a tile of the fused backward kernel
ALIGNMENT = 8  # elements: what the copy engine reads begins at multiples of 16 bytes

MAX_SOFTCAP = 2.0**20  # the forward hides keys by finite scores, and capped scores have a relative error


def is_wide(head_dim: int) -> bool:
    """Return whether heads are so wide that a program keeps less of them in shared memory and registers."""
    return head_dim > 128


def can_run(problem: Problem, operation: Operation, dout_strides: tuple[int, int] | None) -> bool:
    """Return whether a kernel for Hopper computes `operation` of `problem`, on its GPU and with this Triton."""
    strides = *problem.k_strides, *problem.v_strides
    if operation in (Operation.DKDV, Operation.FUSED_BACKWARD):  # these kernels read Q and dO by the copy engine too
        strides += (*problem.q_strides, *(dout_strides or ()))
    return (
        problem.gluon
        and problem.call.softcap < MAX_SOFTCAP
        and problem.target == TARGET
        and DTYPE_BYTES[problem.dtype] == 2
        and MIN_HEAD_DIM <= problem.head_dim <= _max_head_dim(operation)
        and all(stride > 0 and stride % ALIGNMENT == 0 for stride in strides)
        and (operation is not Operation.FUSED_BACKWARD or not problem.call.deterministic or takes_turns(problem))
        and _has_triton()
    )


def _max_head_dim(operation: Operation) -> int:
    return MAX_HEAD_DIM_FUSED if operation is Operation.FUSED_BACKWARD else MAX_HEAD_DIM


def _has_triton() -> bool:
    import triton  # imported here, because tiles can be looked up without Triton

    return triton.__version__.startswith(TRITON)


def is_faster(problem: Problem, operation: Operation) -> bool:
    """Return whether a kernel for Hopper is expected to be faster than the portable one.

    For the fused backward kernel, return whether it should beat the two other Hopper kernels.
    """
    small = problem.head_dim <= SMALL_HEAD_DIM
    if operation is Operation.FUSED_BACKWARD and (problem.call.deterministic or takes_turns(problem)):
        return takes_turns(problem)
    if operation is Operation.FUSED_BACKWARD:
        if small:
            return _gains_by_small_fused(problem)
        if problem.call.softcap > 0:  # no run has timed it
            return False
        if problem.call.has_range:
            return _has_wide_window(problem)
        return not has_short_chunks(problem, SHORT_CHUNK_KEYS)
    if operation is Operation.DKDV and small and _most_keys(problem) < VERY_NARROW_KEYS:
        return False
    min_keys = SHORT_CHUNK_KEYS_DKDV if operation is Operation.DKDV else SHORT_CHUNK_KEYS
    return not small or not has_short_chunks(problem, min_keys)


def _gains_by_small_fused(problem: Problem) -> bool:
    """Return whether the fused kernel was measured to beat the pair at a small head_dim.

    The kernel was not measured under ranged masks. Capped scores leave no registers for a block of 128 rows.
    """
    long = problem.slots > 1 or problem.kv_tokens >= SMALL_FUSED_KEYS * problem.sequences
    plain = not problem.ranged and problem.call.softcap == 0
    return plain and long and not has_short_chunks(problem, SHORT_CHUNK_KEYS_DKDV)


def _has_wide_window(problem: Problem) -> bool:
    """Return whether the fused kernel in any order was measured to beat the pair under a window.

    The sequences are whole and on one device, and as long as the window. Other ranged masks were not measured.
    """
    call = problem.call
    only_window = call.attention_chunk == 0 and not call.has_lengths and not problem.row_layout and call.halo == 0
    keys = min(_most_keys(problem), problem.kv_tokens / max(problem.sequences, 1))
    return only_window and problem.slots == 1 and call.causal and keys >= WIDE_WINDOW


def takes_turns(problem: Problem) -> bool:
    """Return whether one backward kernel runs in which tiles of keys take turns at the sums of dQ.

    Under a ranged mask only the environment variable lets them: there turns were measured to gain little.
    """
    wanted = read_switch(TURNS)
    return not problem.ranged and _has_long_walks(problem) if wanted is None else wanted


def heads_side_by_side(problem: Problem) -> int:
    """Return how many KV heads have their tiles in turn, where tiles take turns."""
    return math.gcd(_most_side_by_side(problem), problem.window)


def _most_side_by_side(problem: Problem) -> int:
    return SMALL_TURNS_SIDE_BY_SIDE if problem.head_dim <= SMALL_HEAD_DIM else TURNS_SIDE_BY_SIDE


def _has_long_walks(problem: Problem) -> bool:
    """Return whether tiles of keys see so many rows that turns beat the other kernels that the call allows.

    With fewer heads side by side more programs wait for each other, so that walks have to be longer. Few programs leave
    a GPU partly idle at the end.
    """
    rows = problem.rows * problem.group / max(problem.sequences, 1)
    longer = _most_side_by_side(problem) // heads_side_by_side(problem)
    programs = problem.kv_tokens // FUSED_KEYS * problem.window
    return rows >= _long_walk(problem) * longer and programs >= MANY_TURNS


def _long_walk(problem: Problem) -> float:
    """Return the rows of a sequence and KV head from which on turns were measured to pay, infinity if never."""
    whole = problem.window == problem.kv_heads  # and not one of several windows between ranks
    deterministic = problem.call.deterministic
    if problem.head_dim <= SMALL_HEAD_DIM:
        return SMALL_LONG_WALK if deterministic and whole and _gains_by_small_fused(problem) else math.inf
    if problem.call.softcap > 0:
        return math.inf
    two = heads_side_by_side(problem) == TURNS_SIDE_BY_SIDE
    return LONG_WALK if deterministic and whole and two else VERY_LONG_WALK


def wants_few_keys(problem: Problem) -> bool:
    """Return whether a dK/dV tile should have two consumers instead of three.

    Few rows see a key under a narrow mask, and the cap of scores needs registers.
    """
    small = problem.head_dim <= SMALL_HEAD_DIM
    return small and (problem.call.softcap > 0 or _most_keys(problem) <= NARROW_KEYS)


def _most_keys(problem: Problem) -> float:
    """Return the most keys that a window or chunks let a row see."""
    call = problem.call
    left, right = call.window_size[0], 0 if call.causal else call.window_size[1]
    window = left + right + 1 if min(left, right) >= 0 else math.inf
    return min(window, call.attention_chunk or math.inf)


def length_class(problem: Problem) -> LengthClass:
    """Return which tiles of a kernel serve `problem`."""
    if has_short_chunks(problem, SHORT_CHUNK_KEYS):
        return LengthClass.SHORT
    few_rows = problem.rows < _few_tokens(problem) * problem.sequences
    return LengthClass.FEW_ROWS if few_rows or is_narrow(problem) else LengthClass.LONG


def is_narrow(problem: Problem) -> bool:
    """Return whether a window or chunks leave tiles of query rows as few keys as in a short sequence.

    On average, tiles under a window walk through as many keys as tiles of a causal sequence of twice its length.
    """
    return 2 * _most_keys(problem) < _few_tokens(problem)


def has_moderate_walks(problem: Problem, operation: Operation) -> bool:
    """Return whether programs of FORWARD or DQ should take several heads, as tiles of query rows see few keys.

    Programs of DQ must be many, too.
    """
    keys = min(problem.kv_tokens / max(problem.sequences, 1), _most_keys(problem))
    if operation is Operation.FORWARD:
        return keys <= MODERATE_KEYS
    return keys <= MODERATE_KEYS_DQ and problem.tokens * problem.group * problem.window >= MANY_ROWS


def _few_tokens(problem: Problem) -> float:
    """Return the tokens of a sequence below which it has few rows."""
    return FEW_ROWS / (problem.group * problem.window)


def has_short_chunks(problem: Problem, min_keys: int) -> bool:
    """Return whether chunks average fewer than `min_keys` keys, which leaves blocks of keys partly empty.

    The host knows only the mean length.
    """
    runs = 2 * problem.slots if problem.slots > 1 else 1  # parts of a sequence whose keys lie next to each other
    return problem.kv_tokens < min_keys * runs * problem.sequences
