"""Trains the byte-level model of `model.py` in JAX, modules of Flax NNX, on a mesh of replicas and context parallelism.

    python examples/train_jax.py
    python examples/train_jax.py --devices 4 --data 2 --method ring     # a CPU that acts as four devices, two by two

On several machines, or in several processes on one, start it in each of them with the address of the first one:

    python examples/train_jax.py --coordinator HOST:29500 --processes 2 --process 0
    python examples/train_jax.py --coordinator HOST:29500 --processes 2 --process 1

On one machine with GPUs give each process its own, with CUDA_VISIBLE_DEVICES.

However many devices there are, the losses are the same as on one device, but for rounding.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import jax
from tqdm import tqdm

import model_jax
from model import Sizes, initial_weights
from text import Room, batches

CONTEXT, LEARNING_RATE = 256, 3e-3
ROOM = Room(tokens=512, documents=8, longest=CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    parser.add_argument("--method", choices=("allgather", "ring"), default="allgather", help="how K/V move")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the text (default 0)")
    parser.add_argument("--json", type=Path, help='write {"losses": [...]} to this file')
    parser.add_argument("--data", type=int, help="replicas, each on its part of all devices (default 2 of 4 or more)")
    parser.add_argument("--devices", type=int, help="act as so many devices, in each process, on the CPU")
    parser.add_argument("--coordinator", help="host:port of the first process, for all others to find it")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    arguments = parser.parse_args()
    for name in ("steps", "data", "devices"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that exists, got {arguments.json}")
    for name in ("processes", "process"):
        if getattr(arguments, name) is not None and not arguments.coordinator:
            parser.error(f"--{name}: expected --coordinator with it, without which this process would train alone")

    start_jax(arguments)
    devices = jax.device_count()
    replicas = arguments.data or (2 if devices % 4 == 0 else 1)
    if devices % replicas:
        parser.error(f"--data: expected a divisor of the {devices} devices, got {replicas}")
    losses = train(arguments, replicas)
    if jax.process_index() == 0:
        if arguments.json:
            arguments.json.write_text(json.dumps({"losses": losses}))
        for step in sorted({*range(0, len(losses), -(-len(losses) // 10)), len(losses) - 1}):
            print(f"step {step + 1:>4}: {losses[step]:.6f} nats a byte")


def start_jax(arguments: argparse.Namespace) -> None:
    """Set the options that JAX must know before its first use of a device."""
    os.environ.setdefault("NPROC", "16")  # with two threads, jax 0.10 can wait for ever for another device of a CPU
    jax.config.update("jax_default_matmul_precision", "highest")
    if arguments.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    if arguments.coordinator:
        # Seconds until all others end when one process dies, and when one raises an error.
        timeouts = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 30}
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process, **timeouts)


def train(arguments: argparse.Namespace, replicas: int) -> list[float]:
    """The loss before each step, in nats a byte of the whole batch."""
    shape = replicas, jax.device_count() // replicas
    mesh = jax.make_mesh(shape, ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    weights = initial_weights(Sizes(), arguments.seed)  # all processes begin alike, and stay so
    step = model_jax.trainer(weights, Sizes(), LEARNING_RATE, ROOM, mesh, arguments.method)
    text = itertools.islice(batches(ROOM, CONTEXT, arguments.seed), arguments.steps)
    quiet = True if jax.process_index() > 0 else None  # None: no bar where it would fill a log
    losses = []
    with tqdm(text, total=arguments.steps, unit="step", disable=quiet) as progress:
        for documents in progress:
            losses.append(step(documents))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
