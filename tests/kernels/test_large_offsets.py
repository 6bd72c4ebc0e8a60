"""Arrays of more than 2**31 elements, whose offsets no int32 holds: memory that nobody touches costs nothing."""

import mmap
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from tests.support import planned
from tests.support.cases import Case, make_inputs
from tests.support.commands import lines_of
from tests.support.hopper import needs_triton
from tests.support.machine import GPU
from tests.support.rank import assert_rank_is_right

interpreted = pytest.mark.skipif(
    GPU or sys.platform != "linux", reason="needs the interpreter, and memory that Linux gives when it is first touched"
)
MAP_NORESERVE = 0x4000  # Python has no name for it
PROGRAMS = 12  # of a launch that are run: the last ones, which have the last sequence


def untouched(elements):
    """float16 zeros that take no memory until they are touched, behind as many that a wrapped offset would lead to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * (2**31 + elements), flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16)[2**31 :]


def far_apart(x, strides):
    """A copy of `x` with these strides of tokens and heads."""
    memory = untouched(sum(size * stride for size, stride in zip(x.shape, strides, strict=False)))
    return memory.as_strided(x.shape, (*strides, 1), memory.storage_offset()).copy_(x)


def interpret_the_last_programs(launch, *arrays):
    """Like `planned.interpret`, of the last `PROGRAMS` programs alone: those before them have other sequences."""
    count = min(PROGRAMS, launch.grid[0])
    first = launch.grid[0] - count
    set_size, set_place = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
    functions = {
        "set_grid_dim": lambda *_: set_size(*launch.grid),
        "set_grid_idx": lambda x, y, z: set_place(first + x, y, z),
    }
    with mock.patch.multiple(interpreter_builder, **functions):
        return planned.interpret(replace(launch, grid=(count, *launch.grid[1:])), *arrays)


@interpreted
def test_rows_beyond_two_to_the_31_elements_are_read_and_written_in_place():
    """The last of two sequences, behind one that needs no more than its place."""
    case = Case(name="rows", world_size=1, lengths=(24,), heads=1, head_dim=256, dtype="float16")
    before = 2**23 + 64
    tokens, inputs = before + case.tokens, make_inputs(case)
    *tensors, of_lse = planned.rank_tensors(case, inputs, 0)
    shape = tokens, 1, case.head_dim
    arrays = [untouched(tokens * case.head_dim).view(shape) for _ in tensors]
    for array, x in zip(arrays, tensors, strict=True):
        array[before:] = x
    dlse = torch.zeros(1, tokens)
    dlse[:, before:] = of_lse
    into = {name: untouched(tokens * case.head_dim).view(shape) for name in ("out", "dq", "dk", "dv")}
    into["lse"] = torch.zeros(1, tokens)
    batch = [0, before, tokens], 0, 1
    results = planned.attend(*arrays, dlse, *batch, run=interpret_the_last_programs, into=into)
    last = {name: x[:, before:] if name == "lse" else x[before:] for name, x in results.items()}
    assert_rank_is_right(case, inputs, 0, {"kernels": last})


@interpreted
def test_heads_two_to_the_30_elements_apart_are_read_in_place():
    case = Case(name="heads", world_size=1, lengths=(24,), heads=8, kv_heads=4, dtype="float16")
    inputs = make_inputs(case)
    *tensors, dlse = planned.rank_tensors(case, inputs, 0)
    views = (far_apart(x, (case.head_dim, 2**30)) for x in tensors)
    results = planned.attend(*views, dlse, case.cu_seqlens, 0, 1)
    assert_rank_is_right(case, inputs, 0, {"kernels": results})


@interpreted
def test_gathered_keys_beyond_two_to_the_31_elements_are_read_in_place():
    """The chunks of one sequence are whole blocks of keys, and those of the other are not."""
    case = Case(name="gathered", world_size=2, lengths=(64, 20), heads=1, dtype="float16", padding=560)
    inputs = make_inputs(case)
    q, k, v, *cotangents = planned.rank_tensors(case, inputs, 0)
    k, v = (far_apart(x, (2**22, case.head_dim)) for x in (k, v))
    results = planned.attend(q, k, v, *cotangents, case.cu_seqlens, 0, 2)
    assert_rank_is_right(case, inputs, 0, {"kernels": results})


def test_portable_kernels_multiply_by_strides_in_64_bits(tmp_path):
    kernels = ["build_segments", "attention_forward", "backward_delta", "backward_dkdv", "backward_dq"]
    assert lines_of("wide_offsets", "portable", TRITON_CACHE_DIR=str(tmp_path)) == kernels


@pytest.mark.slow
@needs_triton
def test_kernels_for_hopper_multiply_by_strides_in_64_bits(tmp_path):
    attention = ["attention_forward_hopper", "backward_dkdv_hopper", "backward_dq_hopper"]
    fused = ["clear_sums", "backward_fused_hopper", "finish_dq"]
    found = lines_of("wide_offsets", "hopper", TRITON_CACHE_DIR=str(tmp_path), ZIGZAG_HOPPER="1")
    assert found == attention + fused
