"""What the agreement between ranks costs and disturbs: the store, other threads and groups, other processes."""

import collections
import contextlib
import itertools
import os
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import zigzag_torch
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from tests.support.steps import HEAD_DIM, HEADS, KV_HEADS, PLENTY, TOKENS, Program, error_of, expect
from zigzag_torch.parallel import agreement
from zigzag_torch.parallel.collectives import fingerprint

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
METHODS = "ring", "allgather"
WRONG_TIMEOUTS = "-1", "0", "nan", "inf", "1e999", "soon", ""


operations = collections.Counter()


class Counted:
    """A store that counts what is asked of it."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        operations[name] += 1
        return getattr(self.store, name)


def check_packing(world_size):
    """Another number of documents in each of 20 steps: nothing to ask the store for after the first."""
    store_of = dist.ProcessGroup.get_group_store
    for method, by_store in itertools.product(METHODS, (False, True)):
        program, seen = Program(dist.new_group(list(range(world_size))), method), [operations.total()]
        with contextlib.ExitStack() as patches:
            counted = mock.patch.object(dist.ProcessGroup, "get_group_store", lambda group: Counted(store_of(group)))
            patches.enter_context(counted)
            if by_store:
                patches.enter_context(mock.patch.object(agreement, "reach_of", return_value=agreement.Reach.STORE))
            for step in range(20):
                documents = (0,) * (step + 1) + (2 * (step % 4), TOKENS)
                for prepared in (True, False):
                    batch = program.prepare(documents)
                    program.backward(program.forward(cu_seqlens=batch if prepared else batch.cu_seqlens))
                seen.append(operations.total())
        assert seen[0] < seen[1] == seen[-1], seen


def check_threads(rank, world_size):
    """A thread that waits for a rank in one group keeps none from another group, whose store has the same client."""
    waiting, other = (Program(dist.new_group(list(range(world_size))), "ring") for _ in range(2))
    done, errors = threading.Event(), []
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [server and server.port]
    dist.broadcast_object_list(port)
    client = dist.TCPStore("127.0.0.1", port[0], is_master=False, wait_for_workers=False)

    def wait():
        if rank == 1:
            done.wait()
        errors.append(error_of(waiting.first_call))

    def store_of(group):
        return dist.PrefixStore(group.group_name, client)

    with mock.patch.object(dist.ProcessGroup, "get_group_store", store_of):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        other.first_call()
        other.step()
        done.set()
        thread.join()
        assert errors == [None]
        waiting.step()
    dist.barrier()


def check_swapped(rank, world_size):
    """Tensors of one rank are compared with those of the same name on another."""
    program = Program(dist.new_group(list(range(world_size))), "ring")
    numbers = torch.tensor([2, 6], dtype=torch.int32), torch.tensor([4, 8], dtype=torch.int32)
    lengths, unsharded = numbers if rank == 0 else numbers[::-1]
    program.prepare(lengths=lengths, unsharded=unsharded)
    assert program.forward().isnan().all()


def check_timeouts(rank, world_size):
    """A time that is none is an error with a name, on every rank, in the first call and later."""
    program = Program(dist.new_group(list(range(world_size))), "ring")
    for text in WRONG_TIMEOUTS:
        for call in (program.first_call, program.step):
            os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = text if rank == 1 else str(PLENTY)
            error = error_of(call)
            words = f"^rank 1: ZIGZAG_AGREEMENT_TIMEOUT: expected a positive, finite number of seconds, got '{text}'$"
            expect(error, ValueError, words)
            os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(PLENTY)
        program.step()


def check_fork(world_size):
    """A forked child, as of a DataLoader, uses no connection of its parent, and says so."""
    program = Program(dist.new_group(list(range(world_size))), "ring")
    program.step()
    child = os.fork()
    if child == 0:
        failures = 0
        for call in (
            program.prepare,
            program.forward,
            program.first_call,
            lambda: zigzag_torch.validate(program.batch.cu_seqlens, world_size, group=program.group),
        ):
            try:
                call()
            except ValueError as error:
                failures += "group: expected a process group that was made in this process" in str(error)
        os._exit(4 - failures)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    program.step()


def check_costs(rank, world_size):
    os.environ["ZIGZAG_AGREEMENT_TIMEOUT"] = str(PLENTY)
    check_packing(world_size)
    check_threads(rank, world_size)
    check_swapped(rank, world_size)
    check_timeouts(rank, world_size)
    check_fork(world_size)


@pytest.mark.slow
def test_costs_of_the_agreement(tmp_path):
    run_ranks(2, tmp_path, check_costs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that nobody sent
def test_a_dry_run_waits_for_nobody():
    """The process group "fake" has one process, which is one of many ranks: shapes are right, and nothing is asked."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "cp"))
        groups = (dist.group.WORLD, 8, "reference"), (mesh["cp"], 4, "reference"), (mesh["cp"], 4, "interpret")
        for (group, size, backend), method in itertools.product(groups, METHODS):
            cu_seqlens = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32) * size
            zigzag_torch.validate(cu_seqlens, size, group=group)
            options = {"group": group, "method": method, "backend": backend}
            batch = zigzag_torch.prepare_batch(cu_seqlens, unsharded=cu_seqlens, **options)
            leaves = [torch.randn(TOKENS, n, HEAD_DIM, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS)]
            for argument in (batch, cu_seqlens, None) if backend == "reference" else (batch,):
                out = zigzag_torch.zigzag_attention(*leaves, argument, **options)
                gradients = torch.autograd.grad(out.sum(), leaves)
                assert [x.shape for x in (out, *gradients)] == [x.shape for x in (leaves[0], *leaves)]
            with pytest.raises(ValueError, match="causal: expected True or False"):
                zigzag_torch.zigzag_attention(*leaves, causal="yes", **options)
    finally:
        dist.destroy_process_group()


def test_fingerprints_tell_batches_apart():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 7, 1000):
        x = torch.randint(0, 2**31 - 1, (length,), generator=generator, dtype=torch.int32).sort().values
        others = [x, torch.cat((x, x[-1:])), x[:-1]]
        for index in range(min(length, 50)):
            for step in (1, -1, 16, 2**20):
                others.append(x.clone())
                others[-1][index] += step
        for index in range(min(length, 50) - 2):  # sums and sums weighted by position stay the same
            others.append(x.clone())
            others[-1][index : index + 3] += torch.tensor([16, -32, 16], dtype=torch.int32)
        others += [x.flip(0)] if length > 1 else []
        assert len({int(fingerprint(other)) for other in others}) == len(others)
        assert int(fingerprint(x.view(1, -1))) == int(fingerprint(x.clone()))
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.complex64):
        x = torch.tensor([0, 1, 0, 1, 1], dtype=dtype)
        assert int(fingerprint(x)) != int(fingerprint(x.flip(0)))
    assert int(fingerprint(torch.zeros(0, 3))) == 0
