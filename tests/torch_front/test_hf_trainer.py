"""The Trainer of transformers on documents: the loss curve of plain training for any number of ranks, and refusals."""

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.support.hf_models import make_model
from tests.support.hf_trainer import (
    BATCH,
    ZigzagTrainer,
    alone,
    as_launched,
    curve,
    examples,
    make_trainer,
    order,
    order_of_two,
    plain_curve,
    training_arguments,
)
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_torch import unshard_group

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")


def train(directory, data, group, **changes):
    """(the Trainer, its losses and norms of gradients) after training."""
    trainer = make_trainer(training_arguments(directory, **changes), data, group)
    trainer.train()
    return trainer, curve(trainer)


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["unequal", "equal"])
def test_one_device(tmp_path, kind):
    data = examples(kind)
    trainer, found = train(tmp_path, data, None)
    assert_same(found, plain_curve(data, order()))
    batch = next(iter(trainer.get_eval_dataloader()))["zigzag_sharded"]
    in_order = [x for document in data[: trainer.args.eval_batch_size] for x in document["input_ids"]]
    assert unshard_group(batch.input_ids, batch).tolist() == in_order
    check_evaluation(trainer, data)


def check_evaluation(trainer, data):
    """Batches of three, three and two documents: their targets count alike, however many a batch has."""
    trainer.args.per_device_eval_batch_size = 3
    found = trainer.evaluate()["eval_loss"]
    trainer.model.set_attn_implementation("eager")
    assert abs(found - alone(trainer.model, data, range(8)).item()) < 1e-5


def check_curve(rank, world_size, directory):
    as_launched(rank, world_size)
    group = dist.group.WORLD
    for kind in ("unequal", "equal"):
        data = examples(kind)
        trainer, found = train(directory, data, group)
        assert_same(found, plain_curve(data, order()))
    batch = next(iter(trainer.get_train_dataloader()))["zigzag_sharded"]
    with_targets = batch.loss_mask.any().int()
    dist.all_reduce(with_targets)
    assert 0 < with_targets < world_size
    check_evaluation(trainer, data)


@pytest.mark.multigpu
def test_two_ranks(tmp_path):
    run_ranks(2, tmp_path, check_curve, tmp_path / "trainer")


def check_replicas(rank, world_size, directory):
    """Two groups of two, whose batches the optimizer takes together, and two of each."""
    as_launched(rank, world_size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    data = examples("unequal")
    trainer, found = train(directory, data, mesh["cp"], gradient_accumulation_steps=2, max_steps=5)
    assert_same(found, plain_curve(data, order_of_two(accumulated=2)))
    assert trainer.get_total_train_batch_size(trainer.args) == 4 * BATCH
    check_evaluation(trainer, data)


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
    smooth = training_arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(NotImplementedError, match="label_smoothing_factor: expected 0, got"):
        ZigzagTrainer(make_model("qwen3"), smooth, tokens=64)
    by_length = training_arguments(tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(NotImplementedError, match=r"train_sampling_strategy: expected one of .* got 'group_by_length'"):
        ZigzagTrainer(make_model("qwen3"), by_length, tokens=64)
    trainer, _ = train(tmp_path, data, None, max_steps=1)
    with pytest.raises(NotImplementedError, match="prediction_loss_only"):
        trainer.predict(data)
    with pytest.raises(NotImplementedError, match="dataset: expected one with a length, got generator"):
        trainer.get_eval_dataloader(x for x in data)


def test_documents_are_in_order_if_sequential(tmp_path):
    data = examples("equal")
    trainer = make_trainer(training_arguments(tmp_path, train_sampling_strategy="sequential"), data, None)
    loader = trainer.get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        batch = next(iter(loader))["zigzag_sharded"]
        in_order = [x for document in data[:BATCH] for x in document["input_ids"]]
        assert unshard_group(batch.input_ids, batch).tolist() == in_order


def test_an_epoch_has_an_order_of_its_own_also_where_training_goes_on(tmp_path):
    """Two epochs of four batches; the second run begins in the middle of the second epoch."""
    data = examples("unequal")[: 4 * BATCH]
    kwargs = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    trainer, found = train(tmp_path, data, None, **kwargs)
    loader = trainer.get_train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append(list(loader.batch_sampler))
    assert orders[0] != orders[1]
    assert_same(found, plain_curve(data, orders[0] + orders[1]))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(curve(trainer)[-2:], found[-2:])
