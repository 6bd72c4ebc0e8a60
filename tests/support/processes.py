"""Real processes that form a group, for tests between ranks: gloo on a CPU, NCCL with a GPU each."""

import contextlib
import multiprocessing
import os
from datetime import timedelta

import ml_dtypes  # noqa: F401  (its import makes "bfloat16" a NumPy dtype)
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.machine import GPU, HANGS

# Modules that ranks need before they do anything: pytest is imported by their tests, the settings of Inductor by
# `torch.use_deterministic_algorithms`, and all of Inductor by `torch.compile`, which looks for its backends.
PRELOADED = ["zigzag_kernels.plan", "zigzag_torch", "torch._inductor.compile_fx", "tests.support.rank", "pytest"]
PRELOADED += ["tests.support.hf_models", "tests.support.remembered", "transformers.trainer"]


def run_ranks(world_size, directory, function, *arguments, backend="gloo"):
    """Call `function(rank, world_size, *arguments)` in `world_size` new processes of one default group.

    With the backend "nccl" each has a GPU of its own, the current device.

    The first exception of any of them is raised here, with its traceback, and ends the others. On a CPU they are forked
    from a process that has imported what they need, and nothing that starts threads, and each interprets a launch once:
    functions call attention again and again, by other names or inside of other transforms, on the same arrays. Where
    there are GPUs they are spawned, because CUDA does not survive a fork, and importing these modules starts CUDA.
    """
    start_method = "spawn" if GPU else "forkserver"
    if not GPU:
        multiprocessing.get_context(start_method).set_forkserver_preload(PRELOADED)
    given = world_size, str(directory), backend, function, arguments
    mp.start_processes(_rank, given, nprocs=world_size, start_method=start_method)


def _rank(rank, world_size, directory, backend, function, arguments):
    torch.set_num_threads(1)  # as many processes as there are ranks share the cores
    device = torch.device("cuda", rank) if backend == "nccl" else None
    # New memory begins as NaN, so that a row left unwritten is found out. On a GPU that is all that is wanted.
    torch.use_deterministic_algorithms(True, warn_only=device is not None)
    if device:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{os.path.join(directory, 'rendezvous')}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=HANGS),
        device_id=device,
    )
    with contextlib.nullcontext() if GPU else _each_launch_once():
        function(rank, world_size, *arguments)
    dist.barrier()  # so that no thread of gloo is busy when Python ends
    dist.destroy_process_group()


def _each_launch_once():
    from tests.support.remembered import each_launch_once  # imports this module

    return each_launch_once()


def torch_numpy(x):
    """A tensor as an array of its own type, which torch does not make of bfloat16."""
    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view("bfloat16") if x.dtype == torch.bfloat16 else x.numpy()
