"""Compiles the kernels for Hopper, and checks their memory, parameters and spills.

    ZIGZAG_HOPPER=1 python -m tests.programs.compile_hopper HEAD_DIM

Needs no GPU, but a Triton that these kernels run with. With the release that tiles were chosen with, 3.6, it compiles
all of one HEAD_DIM and knows how much each may spill; with another, those that take the longest sequence, without
options up to 128 and with all of them from 128 on. Prints the names.
"""

import contextlib
import io
import os
import sys
from dataclasses import replace

import triton

from tests.support.problems import hopper_problem
from zigzag_jax import launch_gluon
from zigzag_kernels import plan
from zigzag_kernels.families import choose_tiles
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import Layout, Operation
from zigzag_kernels.tiles.override import kernel_name
from zigzag_kernels.tiles.sm_90 import SM_90

TUNED = triton.__version__.startswith("3.6.")
# Bytes: a few numbers a block, in the loops too; with several heads a program, between one head and the next. What
# other releases make of the kernels is in docs/log/hopper.md.
SPILLS = {
    "hopper_dkdv": 16,
    "hopper_fused": 64,
    "hopper_dkdv_short": 160,
    "hopper_dq_short": 96,
}
# More, where tiles take turns: what writers are given, before their loops.
SPILLS_OF_TURNS = 144
# More, where the turns are at blocks of ranged masks, before the loops too.
SPILLS_OF_RANGED_TURNS = 64
# More, where sums of 256 columns add to earlier results.
SPILLS_OF_WIDE_PARTS = {"hopper_forward": 120, "hopper_forward_short": 120}
# More, where masks are ranges of keys and scores are capped; the forward's are between one head and the next.
SPILLS_OF_OPTIONS = {"hopper_dq_few": 224}
SPILLS_OF_OTHER_OPTIONS = 176
SPILLS_UNTUNED = 320
LONG, FEW, SHORT = LENGTHS = (8192, 1), (2048, 1), (8192, 64)  # tokens, sequences
OPTIONS = {
    "window_size": (1023, -1), "softcap": 50.0, "has_lengths": True, "layout": Layout.ROW, "has_sinks": True,
    "return_max_logits": True,
}  # fmt: skip
WHOLE, PART = plan.WHOLE, plan.Part(accumulate=True, dtype="float32")


def cases(head_dim):
    """(type, part, (tokens, sequences), options of the call) of all that is compiled."""
    for dtype, part in (("bfloat16", WHOLE), ("float16", PART)):
        for lengths in LENGTHS:
            tuned = TUNED and (part == WHOLE or lengths != FEW)
            if tuned or ((part, lengths) == (WHOLE, LONG) and head_dim <= 128):
                yield dtype, part, lengths, {}
    if TUNED or head_dim >= 128:
        yield "bfloat16", WHOLE, LONG, OPTIONS


def planned(asked, part):
    """(kernel, launch) of each kernel; those that walk through keys with all their tiles."""
    steps = [asked]
    if asked.tokens == LONG[0] and part == WHOLE and asked.sequences == 1:
        # The fused kernel, up to head_dim 128, in any order and, where it can, in turns.
        steps += [replace(asked, call=replace(asked.call, deterministic=False)), asked]
    made = []
    for turns, step in zip("001", steps, strict=False):
        os.environ[rules.TURNS] = turns
        made += plan.plan_step(step, part=part)
    for kernel, launches in made:
        if kernel and kernel.family == HOPPER.name and (asked.tokens == LONG[0] or not kernel.operation.owns_keys):
            yield kernel, launches[1 if kernel.operation is Operation.FUSED_BACKWARD else 0]


def pointers(launch, dtype):
    """The types of a kernel's arguments, in their order."""
    kinds = {"segments": "int32", "sequences": "int32", "lse": "float32", "delta": "float32", "lse2": "float32"}
    kinds["sinks"] = "float32"
    kinds |= {output.name: output.dtype for output in launch.outputs}
    names = [name.removeprefix("into_") for name in launch.inputs] + [output.name for output in launch.outputs]
    found = [launch_gluon.POINTER_KINDS[kinds.get(name, dtype)] for name in names]
    return found[: len(launch.inputs)] + ["i32"] * len(launch.scalars) + found[len(launch.inputs) :]


def check(kernel, launch, compiled, kinds, head_dim, dtype):
    """The kernel keeps within its shared memory, and has the parameters and threads that the launch gives it."""
    ptx = compiled.asm["ptx"]
    heads = launch.constexprs.get("HEADS_TOGETHER", 1)
    config = replace(choose_tiles(kernel, head_dim, dtype, "9.0"), heads_together=heads)
    bound = HOPPER.shared_memory(kernel, config, head_dim, dtype, SM_90)
    assert compiled.metadata.shared <= bound <= SM_90.shared_memory, (kernel, bound)
    assert compiled.metadata.global_scratch_size == launch.scratch
    assert f".reqntid {32 * compiled.metadata.num_warps}" in ptx
    entry = ptx[ptx.index(".entry") :]
    # Behind its own parameters come global_scratch and profile_scratch.
    assert entry[: entry.index("{")].count(".param ") == len(kinds) + 2


def main(head_dim):
    triton.knobs.nvidia.dump_ptxas_log = True
    reports = {}
    for dtype, part, (tokens, sequences), options in cases(head_dim):
        asked = hopper_problem(tokens, head_dim, dtype, sequences=sequences)
        asked = replace(asked, call=replace(asked.call, **options))
        for kernel, launch in planned(asked, part):
            name = kernel_name(kernel)
            kinds = pointers(launch, dtype)
            constexprs = tuple(launch.constexprs.items())
            with contextlib.redirect_stdout(io.StringIO()) as log:
                compiled = launch_gluon.compile_kernel(
                    launch.kernel, "9.0", tuple(kinds), constexprs, launch.num_warps, 1
                )
            key = launch.kernel, *kinds, *constexprs
            report = reports[key] = log.getvalue() or reports[key]  # compiled once where two names have one kernel
            check(kernel, launch, compiled, kinds, head_dim, dtype)
            spilt = int(report.split(" bytes spill stores")[0].split()[-1])
            most = SPILLS.get(name, 0) if TUNED else SPILLS_UNTUNED
            most += SPILLS_OF_WIDE_PARTS.get(name, 0) if head_dim > 128 and part != WHOLE else 0
            in_turns = launch.constexprs.get("WRITERS")
            most += SPILLS_OF_TURNS if in_turns else 0
            most += SPILLS_OF_RANGED_TURNS if in_turns and options else 0
            most += SPILLS_OF_OPTIONS.get(name, SPILLS_OF_OTHER_OPTIONS) if options else 0
            assert spilt <= most, (name, head_dim, options, report)
            assert not (TUNED and "C75" in report), report
            print(name)


if __name__ == "__main__":
    main(int(sys.argv[1]))
