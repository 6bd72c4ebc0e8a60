"""Training by the Trainer of transformers on documents, and the same training written out for one device."""

import os

import numpy as np
import torch
from torch.utils.data import DistributedSampler
from transformers import Trainer, TrainingArguments

from tests.support.hf_models import IGNORED, VOCABULARY, loss_of, make_model
from tests.support.machine import GPU
from zigzag_torch.hf import ZigzagTrainerMixin

STEPS, BATCH, SIZES = 20, 4, {"num_hidden_layers": 1}


class ZigzagTrainer(ZigzagTrainerMixin, Trainer):
    """A Trainer whose ranks share each batch of documents."""


def examples(kind):
    """Documents; of "equal" ones the middle of one in each batch has labels, so that some ranks have none."""
    rng = np.random.default_rng(0)
    labelled = {batch[0] for batch in order()}
    result = []
    for i in range(STEPS * BATCH):
        ids = rng.integers(3, VOCABULARY, 16 if kind == "equal" else int(rng.integers(1, 30)))
        labels = ids.copy()
        if kind == "equal":
            labels[:5] = labels[12 if i in labelled else 0 :] = IGNORED
        else:
            labels[: len(ids) * (i % 3) // 2] = IGNORED
        result.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return result


def order(replicas=1, replica=0):
    """The documents of the batches of a replica in the first epoch."""
    numbers = list(DistributedSampler(range(STEPS * BATCH), replicas, replica, seed=42))
    return [numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)]


def order_of_two(accumulated=1):
    """The documents of each step of two replicas, which take so many batches a step."""
    halves = zip(order(2, 0), order(2, 1), strict=True)
    numbers = [number for batches in halves for batch in batches for number in batch]
    size = 2 * BATCH * accumulated
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def as_launched(rank, world_size):
    """Set the variables by which torchrun would tell accelerate of this rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(world_size)}


def training_arguments(directory, **changes):
    """The arguments of STEPS steps, whose gradients are too small to be clipped."""
    options = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 1e3, "use_cpu": not GPU, "report_to": "none"}
    options |= {"save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(directory), **(options | changes))


def make_trainer(arguments, data, group, **sizes):
    ranks = group.size() if group else 1
    model = make_model("qwen3", **(SIZES | sizes))
    documents = {"train_dataset": data, "eval_dataset": data[:8]}
    return ZigzagTrainer(model, arguments, group=group, tokens=120 // ranks + 16, **documents)


def curve(trainer):
    """(loss, norm of all gradients) of each step, as the Trainer logs them: [steps, 2]."""
    return np.array([(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x])


def alone(model, data, numbers):
    """The mean loss of the targets of these documents; eager attention takes each document alone."""
    labels = [torch.tensor([*data[i]["labels"][1:], IGNORED]) for i in numbers]
    targets = sum(int((x != IGNORED).sum()) for x in labels)
    ids = [torch.tensor([data[i]["input_ids"]]) for i in numbers]
    logits = [model(input_ids=x, use_cache=False).logits[0] for x in ids]
    return loss_of(torch.cat(logits), torch.cat(labels), max(targets, 1))


def plain_curve(data, batches, **sizes):
    """(loss, norm of all gradients) of each batch with AdamW, written out, on a CPU: [batches, 2]."""
    model = make_model("qwen3", **(SIZES | sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    rows = []
    for batch in batches:
        loss = alone(model, data, batch)
        loss.backward()
        norm = torch.stack([x.grad.norm() for x in model.parameters()]).norm()
        rows.append((loss.item(), norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return np.array(rows)
