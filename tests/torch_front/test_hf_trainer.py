"""The Trainer of transformers on documents: the loss curve of plain training for any number of ranks, and refusals."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DistributedSampler
from transformers import Trainer, TrainingArguments

from tests.support.hf_models import IGNORED, VOCABULARY, loss_of, make_model
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_torch.hf import ZigzagTrainerMixin

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
STEPS, BATCH, SIZES = 20, 4, {"num_hidden_layers": 1}


class ZigzagTrainer(ZigzagTrainerMixin, Trainer):
    """As the docs have it."""


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


def train(directory, data, group, **changes):
    """The losses that the Trainer logs at each step."""
    options = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none"}
    options |= {"save_strategy": "no", "disable_tqdm": True}
    ranks = group.size() if group else 1
    trainer = ZigzagTrainer(
        make_model("qwen3", **SIZES),
        TrainingArguments(str(directory), **(options | changes)),
        group=group,
        tokens=120 // ranks + 16,
        train_dataset=data,
        eval_dataset=data[:8],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses


def alone(model, data, numbers):
    """The mean over the targets of these documents, each of which eager attention takes alone."""
    labels = [torch.tensor([*data[i]["labels"][1:], IGNORED]) for i in numbers]
    targets = sum(int((x != IGNORED).sum()) for x in labels)
    ids = [torch.tensor([data[i]["input_ids"]]) for i in numbers]
    logits = [model(input_ids=x, use_cache=False).logits[0] for x in ids]
    return loss_of(torch.cat(logits), torch.cat(labels), max(targets, 1))


def plain_losses(data, batches):
    """The losses of batches with AdamW, written out."""
    model = make_model("qwen3", **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for batch in batches:
        losses.append(alone(model, data, batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


def order(replicas=1, replica=0):
    """The documents of the batches of a replica in the first epoch."""
    numbers = list(DistributedSampler(range(STEPS * BATCH), replicas, replica, seed=42))
    return [numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)]


def as_launched(rank, world_size):
    """What torchrun would have told accelerate."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(world_size)}


@pytest.mark.parametrize("kind", ["unequal", "equal"])
def test_one_device(tmp_path, kind):
    data = examples(kind)
    _, losses = train(tmp_path, data, None)
    np.testing.assert_allclose(losses, plain_losses(data, order()), rtol=0, atol=1e-5)


def check_curve(rank, world_size, directory):
    as_launched(rank, world_size)
    group = dist.group.WORLD
    for kind in ("unequal", "equal"):
        data = examples(kind)
        trainer, losses = train(directory, data, group)
        np.testing.assert_allclose(losses, plain_losses(data, order()), rtol=0, atol=1e-5)
    batch = next(iter(trainer.get_train_dataloader()))["zigzag_sharded"]
    with_targets = batch.loss_mask.any().int()
    dist.all_reduce(with_targets)
    assert 0 < with_targets < world_size
    found = trainer.evaluate()["eval_loss"]
    trainer.model.set_attn_implementation("eager")
    assert abs(found - alone(trainer.model, data, range(8)).item()) < 1e-5


@pytest.mark.multigpu
def test_two_ranks(tmp_path):
    run_ranks(2, tmp_path, check_curve, tmp_path / "trainer")


def check_replicas(rank, world_size, directory):
    """Two groups of two, whose batches the optimizer takes together, and two of each."""
    as_launched(rank, world_size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    data = examples("unequal")
    trainer, losses = train(directory, data, mesh["cp"], gradient_accumulation_steps=2, max_steps=5)
    halves = order(2, 0), order(2, 1)
    batches = [[x for half in halves for x in half[i] + half[i + 1]] for i in range(0, 10, 2)]
    np.testing.assert_allclose(losses, plain_losses(data, batches), rtol=0, atol=1e-5)
    assert trainer.get_total_train_batch_size(trainer.args) == 4 * BATCH


@pytest.mark.slow
@pytest.mark.multigpu
@pytest.mark.parametrize("check", [check_curve, check_replicas])
def test_four_ranks(tmp_path, check):
    run_ranks(4, tmp_path, check, tmp_path / "trainer")


def test_refusals(tmp_path):
    data = examples("equal")
    for name in ("data_collator", "compute_metrics", "compute_loss_func"):
        with pytest.raises(NotImplementedError, match=f"{name}: expected None"):
            ZigzagTrainer(make_model("qwen3"), tokens=64, **{name: lambda x: x})
    smooth = TrainingArguments(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(NotImplementedError, match="label_smoothing_factor: expected 0, got"):
        ZigzagTrainer(make_model("qwen3"), smooth, tokens=64)
    trainer, _ = train(tmp_path, data, None, max_steps=1)
    with pytest.raises(NotImplementedError, match="prediction_loss_only"):
        trainer.predict(data)
    with pytest.raises(NotImplementedError, match="dataset: expected one with a length, got generator"):
        trainer.get_eval_dataloader(x for x in data)


def test_an_epoch_has_an_order_of_its_own_also_where_training_goes_on(tmp_path):
    """Two epochs of four batches; the second run begins in the middle of the second epoch."""
    data = examples("unequal")[: 4 * BATCH]
    kwargs = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    trainer, losses = train(tmp_path, data, None, **kwargs)
    loader = trainer.get_train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append(list(loader.batch_sampler))
    assert orders[0] != orders[1]
    np.testing.assert_allclose(losses, plain_losses(data, orders[0] + orders[1]), rtol=0, atol=1e-5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(resumed[-2:], losses[-2:], rtol=0, atol=1e-5)
