"""Checks that kernels multiply by a stride in 64 bits whatever grows with the batch, in the code that Triton makes.

    python -m tests.programs.wide_offsets portable
    ZIGZAG_HOPPER=1 python -m tests.programs.wide_offsets hopper

Needs no GPU, and compiles no further than is needed. Prints the names of the kernels.
"""

import os
import re
import sys
from dataclasses import replace
from unittest import mock

from triton.backends.nvidia.compiler import CUDABackend

from tests.programs import compile_hopper, compile_portable
from tests.support.problems import hopper_problem
from zigzag_jax import launch_gluon
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.hopper import rules
from zigzag_kernels.problem import ArraySpec, make_problem

# No tile or table is as large, or has any of these sizes: in the code they can be told from others.
HEADS, KV_HEADS, HEAD_DIM, TOKENS = 88, 22, 120, 8192
COLUMNS = 128  # of the sums of the fused backward
GROUP = HEADS // KV_HEADS
STRIDES = {"q": (80056, 10072), "k": (40088, 5032), "v": (40024, 5048), "dout": (80104, 10088)}
SIZES = {
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    HEADS * HEAD_DIM,
    HEADS * COLUMNS,
    HEADS * (COLUMNS + 1),  # with counters
    KV_HEADS * HEAD_DIM,
    *(x for pair in STRIDES.values() for x in pair),
}
SIZES |= {GROUP * size for size in SIZES}  # a product of two constants is one
TARGET, DTYPE = "9.0", "bfloat16"
# What is in range where its operands are.
SHAPING = "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "ttg.convert_layout"
ARITHMETIC = "arith.addi", "arith.subi", "arith.muli", "arith.divsi", "arith.extsi"
OPERATION = re.compile(r"^\s*(%[\w#:]+) = ([\w.]+) (.*)$")
PARTITION = re.compile(r"^\s*partition\d+\(")
CONSTANT = re.compile(r"(?:dense<)?(-?\d+)>? : ")


class Reached(Exception):
    """Compiling has come to the code that is looked at: `str` of it."""


def code_of(compile_launch):
    """The code that `compile_launch` makes a kernel into: one function, before anything is laid out in registers."""
    add_stages = CUDABackend.add_stages

    def stop(module, _):
        raise Reached(str(module))

    def until_reached(self, stages, options, language, *others):
        add_stages(self, stages, options, language, *others)
        stages["llir" if "GLUON" in str(language) else "ttgir"] = stop

    with mock.patch.object(CUDABackend, "add_stages", until_reached):
        try:
            compile_launch()
        except Reached as reached:
            return str(reached)
    raise AssertionError("the kernel was compiled before, and is in Triton's cache")


def products(code, sizes):
    """(line, whether it has 64 bits) of each product of one of `sizes`, or of T, with what may be large."""
    constants, bounded, tokens, given = {}, set(), {"%T"}, []
    for line in code.splitlines():
        if "ttg.warp_specialize(" in line:
            given = re.findall(r"%[\w#]+", line)
        elif PARTITION.match(line):  # its parameters are what was given, in the same order
            tokens |= {own for own, outer in zip(re.findall(r"%\w+", line), given, strict=False) if outer in tokens}
        found = OPERATION.match(line)
        if not found:
            continue
        name, operation, rest = found.groups()
        operands = re.findall(r"%[\w#]+", rest.split(" : ")[0])
        value = CONSTANT.search(rest) if operation == "arith.constant" else None
        if value:
            constants[name] = int(value[1])
        elif operation in SHAPING and operands[0] in constants:
            constants[name] = constants[operands[0]]
        passes_on = operation in SHAPING + ARITHMETIC and bounded.issuperset(operands)
        remainder = operation == "arith.remsi" and operands[1] in constants
        if operation in ("arith.constant", "tt.make_range") or passes_on or remainder:
            bounded.add(name)
        elif operation == "arith.muli":
            sized = any(constants.get(x) in sizes for x in operands)
            if sized or (not tokens.isdisjoint(operands) and constants.keys().isdisjoint(operands)):
                yield line, "i64" in rest.split(" : ")[1]


def problems(gluon):
    """Problems with K/V in one part and in several, and for Hopper a window of one head, and a problem whose programs
    take several heads each, for which these follow each other."""
    shapes = {"q": (TOKENS, HEADS, HEAD_DIM), "k": (TOKENS, KV_HEADS, HEAD_DIM), "v": (TOKENS, KV_HEADS, HEAD_DIM)}
    arrays = [ArraySpec(shape, DTYPE, STRIDES[name]) for name, shape in shapes.items()]
    gathered = [arrays[0], *(x._replace(shape=(2 * TOKENS, *x.shape[1:])) for x in arrays[1:])]
    for world_size, given in ((1, arrays), (2, gathered)):
        # The pair, then the fused backward in any order and in turns.
        for deterministic, turns in ((True, "0"), (False, "0"), (True, "1")) if gluon else ((True, "0"),):
            os.environ[rules.TURNS] = turns
            call = make_call_spec(head_dim=HEAD_DIM, backend="triton", deterministic=deterministic)
            made = make_problem(*given, call, sequences=1, world_size=world_size, target=TARGET, gluon=gluon)
            yield made
            if turns == "1" and world_size > 1:
                yield replace(made, window=1)
    if gluon:
        yield hopper_problem(sequences=64)


def is_for_hopper(launch):
    return launch.kernel.fn.__module__.startswith("zigzag_kernels.hopper.")


def check(launch):
    """`AssertionError` if a product of the kernel has 32 bits that may need more."""
    name = launch.kernel.fn.__name__

    def compile_launch():
        if not launch.scratch:
            return compile_portable.compile_launch(launch, TARGET, DTYPE)
        kinds, constexprs = compile_hopper.pointers(launch, DTYPE), tuple(launch.constexprs.items())
        return launch_gluon.compile_kernel(launch.kernel, TARGET, tuple(kinds), constexprs, launch.num_warps, 1)

    # Programs of a few lines count elements one by one.
    of_elements = {launch.constexprs["BLOCK"]} if is_for_hopper(launch) and "ROW" in launch.constexprs else set()
    odd = launch.constexprs.get("HEAD_DIM", HEAD_DIM) == HEAD_DIM
    found = list(products(code_of(compile_launch), SIZES | of_elements if odd else set()))
    narrow = [line.strip() for line, wide in found if not wide]
    assert found or not odd or name == "build_segments", f"{name}: no offset is where they are looked for"
    assert not narrow, f"{name}: {len(narrow)} of {len(found)} offsets have 32 bits: {narrow}"


def main(family):
    gluon, names = family == "hopper", {}
    for made in problems(gluon):
        for step in plan.plan_step(made, dout_strides=STRIDES["dout"]):
            for launch in step.launches:
                if gluon == is_for_hopper(launch):
                    check(launch)
                    names[launch.kernel.fn.__name__] = None
    print(*names, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
