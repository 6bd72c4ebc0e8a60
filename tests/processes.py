"""Real processes that form a gloo group, for tests of what happens between ranks."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size, directory, function, *arguments):
    """Call `function(rank, world_size, *arguments)` in `world_size` new processes of one default group.

    The first exception of any of them is raised here, with its traceback, and ends the others.
    """
    mp.start_processes(
        _rank, (world_size, str(directory), function, arguments), nprocs=world_size, start_method="spawn"
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
    dist.destroy_process_group()
