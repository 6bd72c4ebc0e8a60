"""Every row of the table for PyTorch in docs/reference/errors-between-ranks.md, with two and three ranks.

A fault is what one rank, the odd one, does in place of a call that the others make. It comes in the first call of a
group, in the first and in the third step, in place of a backward pass, or after an error that all ranks have caught.
Afterwards the ranks are in step, or hear that their group is of no more use.
"""

import functools
import itertools
import os
import re
import threading
import time

import pytest
import torch
import torch.distributed as dist

import zigzag_torch
from tests.support.machine import GPU, LATENESS
from tests.support.processes import run_ranks
from tests.support.steps import (
    DOCUMENTS,
    GOOD,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LENGTHS,
    TIMEOUT,
    TOKENS,
    TOO_LATE,
    Program,
    at_once,
    error_of,
    expect,
)
from zigzag_torch.parallel import agreement, allgather, collectives, ring

METHODS = "ring", "allgather"
AT_ONCE = 40  # programs that wait
pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
WHEN = ("first call", "first step", "third step", "backward", "after an error")


def other_shape():
    return [torch.zeros(TOKENS + 2, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def halves(program):
    return [x.detach().half() for x in program.leaves]


def ring_or_not(program):
    return "allgather" if program.options["method"] == "ring" else "ring"


# What the odd rank calls, and the part of the error that names the difference: `{odd}` has it, `{others}` do not.
DIFFERENCES = {
    "option": (lambda p, call: call(causal=False), "causal: {others} True, {odd} has False"),
    "shape": (lambda p, call: call(other_shape()), r"q: {others} .*, {odd} has \(\(10, 4, 16\), 'float32'\)"),
    "dtype": (lambda p, call: call(halves(p)), r"q: {others} .*, {odd} has \(\(8, 4, 16\), 'float16'\)"),
    "own fault": (lambda p, call: call(causal="yes"), "^{odd}: causal: expected True or False, got 'yes'$"),
    "validate alone": (
        lambda p, call: zigzag_torch.validate(p.cu_seqlens(), p.size, group=p.group),
        "call: {others} .*, {odd} has validate",
    ),
    "prepare alone": (lambda p, call: p.prepare(), "call: {others} .*, {odd} has prepare_batch$"),
    "not prepared": (
        lambda p, call: p.forward(cu_seqlens=p.cu_seqlens()),
        "call: {others} .*, {odd} has zigzag_attention without a batch prepared with this group$",
    ),
}  # fmt: skip


def names(program, odd):
    others = [rank for rank in range(program.size) if rank != odd]
    who = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
    return {"odd": f"rank {odd}", "others": who}


def bring_to(program, when):
    """Run the program up to the point `when`, and return the call that follows there on a good rank."""
    if when == "first call":
        return program.first_call
    if when == "first step":
        program.prepare()
        return program.forward
    program.step()
    program.step()
    if when == "after an error":
        program.caught()
    program.prepare()
    if when == "backward":
        out = program.forward()
        return lambda: program.backward(out)
    return program.forward


def check_differences(program, when, fault, odd=1):
    """All ranks raise the same error, and go on."""
    act, pattern = DIFFERENCES[fault]
    call = bring_to(program, when)
    mine = functools.partial(act, program, program.first_call if when == "first call" else program.forward)
    error = error_of(mine if program.rank == odd else call)
    if when == "backward" and fault in ("option", "shape", "dtype"):
        pattern = "call: {others} backward pass of zigzag_attention, {odd} has zigzag_attention$"
    ordered = pattern if odd else re.sub("({others}.*), ({odd}.*)", r"\2, \1", pattern)
    expect(error, ValueError, ordered.format(**names(program, odd)))
    program.step()
    program.step()


def check_agreed_before(program, when):
    """The odd rank makes a call that all have made before, only not now."""
    other = ring_or_not(program)
    if when != "first call":
        batch = zigzag_torch.prepare_batch(program.cu_seqlens(), **program.options | {"method": other})
        program.forward(cu_seqlens=batch, method=other).sum().backward()
    call = bring_to(program, when)
    error = error_of(functools.partial(program.first_call, method=other) if program.rank == 1 else call)
    pattern = "call: .*, rank 1 has zigzag_attention$" if when == "backward" else f"method: .*, rank 1 has {other}"
    if when not in ("first call", "backward"):
        pattern += "|sequences: "
    expect(error, ValueError, pattern)
    program.step()


def check_no_backward(program, when):
    """The odd rank goes on to the next step in place of its backward pass, as it skips it or wants no gradient."""
    bring_to(program, when)
    wants_gradient = program.rank != 1 or when != "third step"
    leaves = program.leaves if wants_gradient else [x.detach() for x in program.leaves]
    out = program.first_call(leaves=leaves) if when == "first call" else program.forward(leaves)
    error = error_of(program.step if program.rank == 1 else lambda: program.backward(out))
    expect(error, ValueError, "call: .* backward pass of zigzag_attention, rank 1 has prepare_batch$")
    program.step()


def check_values(program, when):
    """Nothing is raised, and nothing is silently wrong."""
    bring_to(program, when if when != "first call" else "first step")
    for lengths in (LENGTHS, DOCUMENTS):
        batch = program.prepare(lengths if program.rank == 1 else GOOD)
        for argument in (batch, batch.cu_seqlens):
            out = program.forward(cu_seqlens=argument)
            assert out.isnan().all()
            assert all(x.isnan().all() for x in program.backward(out))
    tokens = torch.arange(8 * program.size)
    for own, alike in ((tokens, True), (tokens + (program.rank == 1), False), (tokens.double() / 3, True)):
        program.prepare(unsharded=own)
        assert program.forward().isnan().all() == (not alike)
        difference = error_of(
            lambda own=own: zigzag_torch.validate(
                program.cu_seqlens(), program.size, group=program.group, unsharded=own
            )
        )
        assert (difference is None) == alike
        if difference:
            expect(difference, ValueError, "unsharded: ranks? .* fingerprint .*, rank 1 has fingerprint")
    program.step()


def check_late(program, when, odd):
    """A rank that comes in time is no fault."""
    call = bring_to(program, when)
    if program.rank == odd:
        time.sleep(LATENESS)
    error = error_of(call)
    assert error is None
    program.step()


def did_not_come(odd):
    """The error of other ranks. Ranks that begin to wait a second later than others may be missed as well."""
    return rf"^ranks? ([0-9], )*{odd}(, [0-9])* did not make this call within {TIMEOUT:g} s"


def check_too_late(program, when, odd):
    """The others give up; the odd rank finds nobody when it comes."""
    call = bring_to(program, when)
    if program.rank == odd:
        time.sleep(TOO_LATE)
    error = error_of(call)
    if program.rank != odd:
        expect(error, RuntimeError, did_not_come(odd))
    if when == "first call":  # they meet again, whoever comes first
        if program.rank == odd:
            expect(error, RuntimeError, f"did not make this call within {TIMEOUT:g} s") if error else None
        return
    if program.rank == odd:
        expect(error, RuntimeError, "this call is over on rank|ranks made this call, or one before, more than")
    error = error_of(program.step)
    expect(error, RuntimeError, "The connections of this group are closed, so that it serves no other call: make a new")


def check_absent(program, when, odd):
    """The odd rank does not come; in the first call it is welcome later."""
    call = bring_to(program, when)
    if program.rank != odd:
        error = error_of(call)
        expect(error, RuntimeError, did_not_come(odd))
    elif when == "first call":
        time.sleep(TOO_LATE)
    if when == "first call":
        program.step()


def check_failure_inside(program, when):
    """The odd rank fails in the middle of a call, between two transfers, and goes on."""
    call = bring_to(program, when)
    if program.rank == 1:
        failing.add(threading.get_ident())
    error = error_of(call)
    failing.discard(threading.get_ident())
    if program.rank == 1:
        expect(error, RuntimeError, "^out of memory")
    else:
        expect(error, RuntimeError, did_not_come(1) + "|^this call is over on rank")


failing = set()


def fail_inside():
    """Make transfers fail in threads that are in `failing`."""
    names = {collectives: ("gather_into", "reduce_into", "exchange")}
    names |= {allgather: ("gather_into", "reduce_into"), ring: ("exchange",)}
    for module, name in [(module, name) for module, of_module in names.items() for name in of_module]:
        transfer = getattr(module, name)

        def fail(*arguments, transfer=transfer, **options):
            if threading.get_ident() in failing:
                raise RuntimeError("out of memory, say")
            return transfer(*arguments, **options)

        setattr(module, name, fail)


def check_compiled(program):
    """A fault that is found while `torch.compile` traces is raised there alone."""
    program.prepare()
    compiled = torch.compile(program.forward, backend="eager", fullgraph=True)
    compiled()
    dist.barrier()
    error = error_of(functools.partial(compiled, causal="yes") if program.rank == 1 else compiled)
    if program.rank == 1:
        assert "causal: expected True or False, got 'yes'" in str(error)
    else:
        expect(error, RuntimeError, did_not_come(1))


def check_by_store(program, fault, odd):
    """With transfers that the host does not wait for: a fault in a later step is raised where it is, in time.

    The others wait for the data of the call that they make, and get it if the odd rank goes on with that call.
    """
    call = bring_to(program, "third step")
    if program.rank == odd:
        error = error_of(functools.partial(DIFFERENCES[fault][0], program, program.forward))
        if fault == "own fault":
            expect(error, ValueError, "^causal: expected True or False, got 'yes'$")
            assert "The other ranks could not be told" in error.__notes__[0]
        else:
            words = f"did not make this call within {TIMEOUT:g} s .* or made another call, one that all ranks"
            expect(error, RuntimeError, words)
    assert error_of(call) is None
    program.step()


def programs(world_size, backend="reference"):
    """Programs on new groups, with each method in turn."""
    for method in itertools.cycle(METHODS):
        yield Program(dist.new_group(list(range(world_size))), method, backend)


def check_other_calls(rank, world_size):
    os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(TIMEOUT)
    new = programs(world_size)
    for when in WHEN:
        for fault in DIFFERENCES:
            check_differences(next(new), when, fault)
        check_differences(next(new), when, "validate alone", odd=0)
        check_agreed_before(next(new), when)
        check_no_backward(next(new), when)
        check_values(next(new), when)
        dist.barrier()


def check_waiting(rank, world_size):
    os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(TIMEOUT)
    fail_inside()
    new, waiting = programs(world_size), []
    for when in WHEN:
        for check in (check_late, check_too_late, check_absent):
            waiting += [functools.partial(check, next(new), when, odd) for odd in (0, 1)]
        waiting.append(functools.partial(check_failure_inside, next(new), when))
    for first in range(0, len(waiting), AT_ONCE):
        at_once(waiting[first : first + AT_ONCE])
        dist.barrier()


def check_kernels(rank, world_size):
    """The same in the calls of kernels, which agree by themselves."""
    os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(TIMEOUT)
    fail_inside()
    new = programs(world_size, "interpret")
    for _ in METHODS:
        check_differences(next(new), "first step", "option")
        check_differences(next(new), "backward", "own fault")
        check_no_backward(next(new), "first step")
        check_values(next(new), "first step")
        check_failure_inside(next(new), "first step")
        check_failure_inside(next(new), "backward")
    check_compiled(next(programs(world_size)))


def programs_by_store(world_size):
    """Programs with transfers that the host does not wait for."""
    os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(TIMEOUT)
    agreement.reach_of = lambda _: agreement.Reach.STORE
    return programs(world_size)


def check_other_calls_by_store(rank, world_size):
    new = programs_by_store(world_size)
    for fault in DIFFERENCES:
        for when in ("first call", "first step") if "prepare" not in fault else ("first call",):
            check_differences(next(new), when, fault)
    os.environ[agreement.EVERY_CALL_VARIABLE] = "1"
    for check in (check_agreed_before, check_no_backward):
        check(next(new), "third step")
    check_differences(next(new), "third step", "own fault")
    os.environ[agreement.EVERY_CALL_VARIABLE] = "yes"
    expect(error_of(next(new).first_call), ValueError, "ZIGZAG_AGREE_IN_EVERY_CALL: expected 0 or 1, got 'yes'")


def check_waiting_by_store(rank, world_size):
    new = programs_by_store(world_size)
    later = ("option", 1), ("own fault", 1), ("own fault", 0), ("validate alone", 0)
    waiting = [functools.partial(check_by_store, next(new), *fault) for fault in later for _ in METHODS]
    waiting += [functools.partial(check_too_late, next(new), "first call", odd) for odd in (0, 1)]
    waiting += [functools.partial(check_absent, next(new), "first call", odd) for odd in (0, 1)]
    at_once(waiting)
    dist.barrier()


WAITING = [pytest.param(check, marks=pytest.mark.slow) for check in (check_kernels, check_waiting_by_store)]


@pytest.mark.parametrize("check", [check_other_calls_by_store, *WAITING])
def test_faults_in_other_transfers(check, tmp_path):
    run_ranks(2, tmp_path, check)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_another_call_of_one_rank(world_size, tmp_path):
    run_ranks(world_size, tmp_path, check_other_calls)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_comes_late_or_never(world_size, tmp_path):
    run_ranks(world_size, tmp_path, check_waiting)
