"""The division of a program's warps into partitions, and the value that keeps two loops of one partition apart."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin

CONSUMER_REGISTERS = {2: 240, 3: 160, 4: 112}  # of a thread, by the number of consumers: all that producers leave
OTHER_REGISTERS = 24


@builtin
def specialize_warps(consumer, arguments, warpgroups, *others, _semantic=None, _generator=None):
    """Run `consumer(n, *arguments)` in each of `warpgroups` warpgroups, side by side with `others`.

    Each of `others` is (function, arguments, number of warps) and has few registers. Write tuples of arguments at the
    call: bound to a name, a tuple turns its constants into tensors.
    """
    consumers, others = warpgroups.value, [(function, given, warps.value) for function, given, warps in others]
    partitions = [(consumer, gl.tuple([gl.constexpr(n), *arguments])) for n in range(consumers)]
    partitions += [(function, given) for function, given, _ in others]
    warps = [4] * (consumers - 1) + [warps for *_, warps in others]
    registers = [CONSUMER_REGISTERS[consumers]] * (consumers - 1) + [OTHER_REGISTERS] * len(others)
    return _semantic.warp_specialize(partitions, warps, registers, _generator)


@gluon.jit
def opaque(x):
    """Return `x`, int32, so that the compiler knows nothing about its value.

    A loop that begins at an opaque number is not merged with a first trip before it: merged, both ran 15 % slower.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)
