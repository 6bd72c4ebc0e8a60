"""Trains the byte-level model of `model.py` in PyTorch, its documents dealt out to all processes that torchrun starts.

    python examples/train_torch.py
    torchrun --nproc_per_node=4 examples/train_torch.py --method ring

Each process takes one GPU, or all share the CPU where there is none. However many there are, the losses are the same
as of one process, but for rounding.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import model_torch
from model import Sizes, initial_weights
from text import Room, batches

ROOM, CONTEXT, LEARNING_RATE = Room(tokens=512, documents=8), 256, 3e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    parser.add_argument("--method", choices=("allgather", "ring"), default="allgather", help="how K/V move")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the text (default 0)")
    parser.add_argument("--json", type=Path, help='write {"losses": [...]} to this file')
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that exists, got {arguments.json}")

    group, device = join_group()
    losses = train(arguments, group, device)
    if group is None or group.rank() == 0:
        if arguments.json:
            arguments.json.write_text(json.dumps({"losses": losses}))
        for step in sorted({*range(0, len(losses), -(-len(losses) // 10)), len(losses) - 1}):
            print(f"step {step + 1:>4}: {losses[step]:.6f} nats a byte")
    if group:
        dist.barrier()  # so that no thread of gloo is busy when Python ends
        dist.destroy_process_group()


def join_group() -> tuple[dist.ProcessGroup | None, str]:
    """(the group of all processes, None if torchrun did not start this one; the device of this process)."""
    torch.set_float32_matmul_precision("highest")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return None, device
    if device == "cpu":
        dist.init_process_group("gloo")
    else:  # with its device NCCL connects here, in the order of the program, not in the first call to need it
        dist.init_process_group("nccl", device_id=torch.device(device))
    return dist.group.WORLD, device


def train(arguments: argparse.Namespace, group: dist.ProcessGroup | None, device: str) -> list[float]:
    """The loss before each step, in nats a byte of the whole batch."""
    weights = initial_weights(Sizes(), arguments.seed)  # all processes begin alike, and stay so
    step = model_torch.trainer(weights, Sizes(), LEARNING_RATE, ROOM, device, group, arguments.method)
    text = itertools.islice(batches(ROOM, CONTEXT, arguments.seed), arguments.steps)
    quiet = True if group and group.rank() > 0 else None  # None: no bar where it would fill a log
    losses = []
    with tqdm(text, total=arguments.steps, unit="step", disable=quiet) as progress:
        for documents in progress:
            losses.append(step(documents))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
