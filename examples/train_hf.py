"""Trains a Qwen3 or Llama model of transformers on text, its documents dealt out to the processes that torchrun starts.

    python examples/train_hf.py
    torchrun --nproc_per_node=4 examples/train_hf.py --replicas 2 --save checkpoints
    torchrun --nproc_per_node=8 examples/train_hf.py --model qwen3-8b --context 262144 --tokens 262144 --lengths equal

The weights are sharded by FSDP2 over all processes, and each batch over the processes of a context-parallel group.
Losses are the same for any number of processes but for rounding, and a checkpoint is resumed by any number of them.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig

import hf_model
from text import Room, documents
from zigzag_torch import ZigzagCollator, hf

# Dense bfloat16 operations a second, as the makers say.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ", ".join(hf_model.CONFIGS)
    add("--model", default="tiny-qwen3", help=f"{names}, or a directory with a config.json, and perhaps weights")
    add("--layers", type=int, help="how many of the model's layers to take (default all)")
    add(
        "--attention", choices=("zigzag", "sdpa", "eager"), default="zigzag", help="sdpa and eager: data parallel alone"
    )
    add("--method", choices=("allgather", "ring"), default="allgather", help="how K/V move")
    add("--text", type=Path, nargs="*", help="files to train on (default: Python's standard library)")
    add("--context", type=int, default=256, help="tokens of a document at most (default 256)")
    add("--tokens", type=int, default=512, help="tokens of a step of a context-parallel group (default 512)")
    add("--documents", type=int, default=8, help="documents in these tokens at most (default 8)")
    add("--lengths", choices=("natural", "equal"), default="natural", help="equal: the text joined, and cut anew")
    add("--replicas", type=int, default=1, help="context-parallel groups (default 1: all processes are one)")
    add("--dtype", choices=("bfloat16", "float32"), help="computed in (default bfloat16, without a GPU float32)")
    add("--checkpointing", choices=("none", "full", "attention"), default="attention",
        help="what is computed again: nothing, all of a layer, or all but attention (default)")  # fmt: skip
    add("--mlp-rows", type=int, help="rows that an MLP has in memory at a time, to be computed once more (default all)")
    add("--offload", action="store_true", help="keep the inputs of layers in the memory of the host")
    add("--steps", type=int, default=20, help="steps in all, those before resuming too (default 20)")
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0, help="of the weights and the order of the text (default 0)")
    add("--save", type=Path, help="directory of checkpoints; training goes on from the newest one there")
    add(
        "--save-every", type=int, default=100, help="steps between two checkpoints (default 100); the last is saved too"
    )
    add("--peak", type=float, help="operations a second of a device, for MFU (default: by its name)")
    add("--json", type=Path, help="write losses, tokens a second, MFU and peak memory to this file")
    arguments = parser.parse_args()
    if arguments.offload and arguments.checkpointing == "none":
        parser.error("--offload: expected --checkpointing full or attention, got none")
    for name in ("steps", "tokens", "documents", "context", "replicas", "save_every", "mlp_rows"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that exists, got {arguments.json}")
    return arguments


def join_group() -> torch.device:
    """The device of this process, which is in the default group: alone if torchrun did not start it."""
    torch.set_float32_matmul_precision("highest")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    kwargs = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None, **kwargs)
    return device


class Steps(Dataset):
    """The documents of every step of a replica, which depend on the seed and the number of the step alone."""

    def __init__(self, pool: list[np.ndarray], room: Room, seed: int, replica: int, replicas: int):
        self.pool, self.room, self.seed, self.replica, self.replicas = pool, room, seed, replica, replicas

    def __getitem__(self, step: int) -> list[torch.Tensor]:
        rng = np.random.default_rng((self.seed, step * self.replicas + self.replica))
        batch, left = [], self.room.tokens
        while left and len(batch) < self.room.documents:
            batch.append(self.pool[rng.integers(len(self.pool))][:left])
            left -= len(batch[-1])
        return [torch.from_numpy(document.astype(np.int64)) for document in batch]


def read_text(arguments: argparse.Namespace) -> list[np.ndarray]:
    """The text as documents of tokens, by the tokenizer of the model's directory, or in bytes."""
    has_tokenizer = (Path(arguments.model) / "tokenizer.json").exists()
    texts = [path.read_bytes() for path in arguments.text or ()] or [x.tobytes() for x in documents(1 << 30)]
    if has_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
        pool = [np.array(tokenizer(text.decode(errors="replace"))["input_ids"]) for text in texts]
    else:
        pool = [np.frombuffer(text, np.uint8) for text in texts]
    size = arguments.context
    if arguments.lengths == "equal":
        joined = np.concatenate(pool)
        joined = np.tile(joined, -(-size // len(joined)))
        return [joined[i : i + size] for i in range(0, len(joined) - size + 1, size)]
    return [part for text in pool for i in range(0, len(text), size) if len(part := text[i : i + size]) > 1]


class Checkpoints:
    """Checkpoints of weights, optimizer and number of steps, which any number of processes can load."""

    def __init__(self, directory: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.directory, self.model, self.optimizer = directory, model, optimizer

    def _state(self, step: int) -> dict:
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": optimizer, "step": step}

    def load(self) -> int:
        """The number of steps of the newest checkpoint, which is loaded; 0 if there is none."""
        found = [] if self.directory is None else list(self.directory.glob("step-*/.metadata"))
        if not found:
            return 0
        newest = max(found, key=lambda path: int(path.parent.name.removeprefix("step-"))).parent
        state = self._state(0)
        dcp.load(state, checkpoint_id=newest)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return state["step"]

    def save(self, step: int) -> None:
        """Write the checkpoint of this step; it is complete once its `.metadata` is there."""
        if self.directory is not None:
            dcp.save(self._state(step), checkpoint_id=self.directory / f"step-{step}")


def main() -> None:
    arguments = parse_arguments()
    device = join_group()
    try:
        results = train(arguments, device)
        if arguments.json and dist.get_rank() == 0:
            arguments.json.write_text(json.dumps(results))
        dist.barrier()  # so that no thread of gloo is busy when Python ends
    finally:
        dist.destroy_process_group()


def train(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Train; return losses by step in nats a token, their tokens, tokens a second, MFU and peak memory in GiB."""
    mesh = make_mesh(arguments, device)
    group = mesh["cp"]
    config = hf_model.make_config(arguments.model, arguments.layers, arguments.context)
    model, weights = make_model(arguments, config, group, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, fused=device.type == "cuda")
    checkpoints = Checkpoints(arguments.save, model, optimizer)
    done = checkpoints.load()
    steps = range(done, arguments.steps)
    record = Record(device, arguments.peak)
    quiet = True if dist.get_rank() else None  # None: no bar where it would fill a log
    batches = tqdm(
        make_loader(arguments, mesh, steps, device), initial=done, total=arguments.steps, unit="step", disable=quiet
    )
    with batches as progress:
        start = time.perf_counter()
        for step, batch in zip(steps, progress, strict=True):
            inputs = batch.to(device, non_blocking=True)
            kwargs = hf_model.model_inputs(inputs, arguments.attention, group, arguments.method)
            share, loss = hf_model.mean_loss(model(inputs.labels, **kwargs), inputs.labels)
            share.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.item()  # the host waits here, once a step
            seconds = time.perf_counter() - start
            report = record.add(loss, seconds, *hf_model.step_work(config, weights, batch, device))
            progress.set_postfix_str(report)
            if not dist.get_rank():
                progress.write(f"step {step + 1}: {report}")
            if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
                checkpoints.save(step + 1)
            start = time.perf_counter()
    return {"first": done} | record.results()


def make_mesh(arguments: argparse.Namespace, device: torch.device) -> DeviceMesh:
    """The mesh of all processes: axis "dp" has the replicas, axis "cp" the ranks that share a batch."""
    world_size = dist.get_world_size()
    replicas = arguments.replicas if arguments.attention == "zigzag" else world_size
    if world_size % replicas:
        raise ValueError(f"--replicas: expected a divisor of the {world_size} processes, got {replicas}")
    return init_device_mesh(device.type, (replicas, world_size // replicas), mesh_dim_names=("dp", "cp"))


def make_model(
    arguments: argparse.Namespace, config: PreTrainedConfig, group: DeviceMesh, device: torch.device
) -> tuple[torch.nn.Module, int]:
    """The model, sharded over all processes, and the number of weights that multiply every token."""
    model = hf_model.make_model(arguments.model, config, arguments.attention, device, arguments.seed)
    if arguments.attention == "zigzag":
        hf.use_mesh(model, group, method=arguments.method)
    hf_model.checkpointed(model, arguments.checkpointing)
    if arguments.mlp_rows:
        hf_model.in_parts(model, arguments.mlp_rows)
    embedding = model.get_input_embeddings().weight
    weights = sum(x.numel() for x in model.parameters() if x.ndim > 1 and x is not embedding)
    if model.get_output_embeddings().weight is embedding:
        weights += embedding.numel()
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    everybody = init_device_mesh(device.type, (dist.get_world_size(),))
    return hf_model.sharded(model, everybody, dtype, offload=arguments.offload), weights


def make_loader(arguments: argparse.Namespace, mesh: DeviceMesh, steps: range, device: torch.device) -> DataLoader:
    """The loader of this process's rows of each of the `steps`."""
    room = Room(arguments.tokens, arguments.documents)
    text = Steps(read_text(arguments), room, arguments.seed, mesh["dp"].get_local_rank(), mesh["dp"].size())
    collate = ZigzagCollator(mesh["cp"], tokens=room.rows(mesh["cp"].size()), max_documents=room.documents)
    return DataLoader(text, batch_size=None, sampler=steps, collate_fn=collate, pin_memory=device.type == "cuda")


class Record:
    """The losses, tokens and speed of the steps of this process."""

    def __init__(self, device: torch.device, peak: float | None):
        self.device = device
        self.peak = peak or next((x for name, x in PEAKS.items() if name in _name(device)), None)
        self.losses, self.tokens, self.rates = [], [], []

    def add(self, loss: float, seconds: float, tokens: int, flops: int) -> str:
        """Record a step, and return a report of it; `tokens` and `flops` are sums over all processes."""
        mfu = flops / dist.get_world_size() / seconds / self.peak if self.peak else None
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.rates.append((tokens / seconds, mfu))
        return f"loss {loss:.4f}, {_speed(*self.rates[-1], self.device)}"

    def results(self) -> dict:
        """The losses, tokens, median speed and peak memory; process 0 prints the median."""
        if not self.losses:
            return {"losses": []}
        measured = self.rates[min(2, len(self.rates) - 1) :]  # the first steps compile kernels and fill caches
        rate = statistics.median(x for x, _ in measured)
        mfu = statistics.median(x for _, x in measured) if self.peak else None
        if not dist.get_rank():
            print(f"median: {_speed(rate, mfu, self.device)}")
        speed = {"tokens_per_second": rate, "mfu": mfu, "peak_gib": _memory(self.device)}
        return {"losses": self.losses, "tokens": self.tokens} | speed


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _memory(device: torch.device) -> float:
    """The most GiB of tensors that this process has had on its device."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def _speed(tokens: float, mfu: float | None, device: torch.device) -> str:
    share = "" if mfu is None else f", MFU {mfu:.1%}"
    memory = f", {_memory(device):.1f} GiB" if device.type == "cuda" else ""
    return f"{tokens:,.0f} tokens/s{share}{memory}"


if __name__ == "__main__":
    main()
