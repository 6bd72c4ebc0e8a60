"""Real processes that form a gloo group, for tests of what happens between ranks."""

import multiprocessing
import os
from datetime import timedelta

import ml_dtypes  # noqa: F401  (its import makes "bfloat16" a NumPy dtype)
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size, directory, function, *arguments):
    """Call `function(rank, world_size, *arguments)` in `world_size` new processes of one default group.

    The first exception of any of them is raised here, with its traceback, and ends the others. They are forked from a
    process that has imported what they need, and nothing that starts threads.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["zigzag_kernels.plan", "zigzag_torch", "oracle"])
    mp.start_processes(
        _rank, (world_size, str(directory), function, arguments), nprocs=world_size, start_method="forkserver"
    )


def _rank(rank, world_size, directory, function, arguments):
    torch.set_num_threads(1)  # as many processes as there are ranks share the cores
    torch.use_deterministic_algorithms(True)  # new memory begins as NaN, so that a row left unwritten is found out
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.path.join(directory, 'rendezvous')}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    function(rank, world_size, *arguments)
    dist.barrier()  # so that no thread of gloo is busy when Python ends
    dist.destroy_process_group()


def torch_numpy(x):
    """A tensor as an array of its own type, which torch does not make of bfloat16."""
    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view("bfloat16") if x.dtype == torch.bfloat16 else x.numpy()
