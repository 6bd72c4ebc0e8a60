"""A training step by the data path between ranks is that of the whole batch, and mistakes of one rank are errors."""

import numpy as np
import pytest
import torch

import zigzag_torch
from tests.support.documents import made_documents
from tests.support.processes import run_ranks
from zigzag_torch import shard_documents, token_mean_loss, unshard_group

LAYOUTS = "document", "row"
IGNORE = -100


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_and_gradients_are_those_of_the_whole_batch(world_size, layout, tmp_path):
    run_ranks(world_size, tmp_path, check_training_step, layout)


def made_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (50, 32), "q": (32, 32), "k": (32, 16), "v": (32, 16), "logits": (32, 50)}
    return {name: (torch.randn(shape, generator=generator) / 4).requires_grad_() for name, shape in shapes.items()}


def forward(weights, batch, group=None):
    """Logits of one layer of attention with positions; the reference computes it, on any device."""
    prepared = batch.prepare(group, backend="reference")
    x = weights["embedding"][batch.input_ids] + batch.position_ids[:, None] / 16
    q, k, v = ((x @ weights[name]).unflatten(1, (-1, 16)) for name in "qkv")
    out = zigzag_torch.zigzag_attention(q, k, v, prepared, group=group, layout=batch.layout, backend="reference")
    return (x + out.flatten(1)) @ weights["logits"]


def check_training_step(rank, world_size, layout):
    group = torch.distributed.group.WORLD
    documents = made_documents((13, 1, 8, 20))
    labels = [np.where(np.arange(len(x)) < 5, IGNORE, x) for x in documents]  # prompts, unevenly over the ranks
    weights = made_weights()
    whole = shard_documents(documents, 0, 1, labels=labels)
    alone = token_mean_loss(forward(weights, whole), whole.labels, whole.num_targets)
    wanted = torch.autograd.grad(alone, [*weights.values()])
    tokens = 4 * world_size + 20
    batch = shard_documents(documents, rank, world_size, labels=labels, tokens=tokens, max_documents=6, layout=layout)
    assert batch.prepare(group, method="halo", backend="reference", window_size=(1, 0)).halo == 1
    logits = forward(weights, batch, group)
    for gradients, divisor in (("sum", 1), ("mean", world_size)):
        loss = token_mean_loss(logits, batch.labels, batch.num_targets, group, gradients=gradients)
        torch.testing.assert_close(loss, alone)
        ours = torch.autograd.grad(loss, [*weights.values()], retain_graph=True)
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.distributed.all_reduce(mine)
            torch.testing.assert_close(mine / divisor, theirs)
    same = [torch.zeros(()) for _ in range(world_size)]
    torch.distributed.all_gather(same, loss.detach())
    assert len({x.item() for x in same}) == 1
    ids = torch.tensor(np.concatenate(documents))
    assert torch.equal(unshard_group(batch.input_ids, batch, group), ids)
    torch.testing.assert_close(unshard_group(logits, batch, group), forward(weights, whole))
    leaf, factors = torch.ones(tokens, requires_grad=True), torch.arange(len(ids)) + 1.0
    (unshard_group(leaf, batch, group) * factors * (rank + 1)).sum().backward()
    assert leaf.grad is not None
    of_all = factors.new_tensor([*factors, 0])[batch.rows] * sum(range(1, world_size + 1))
    assert torch.equal(leaf.grad, of_all)
    check_mistakes(rank, world_size, group, batch, logits, documents)


def check_mistakes(rank, world_size, group, batch, logits, documents):
    """What users write by hand, and what becomes of it."""
    options = {"group": group, "gradients": "sum"}
    own, together = int(batch.loss_mask.sum()), int(batch.num_targets)
    with pytest.raises(ValueError, match=rf"num_targets: expected the {together} labels .*, got \d+ on rank 0"):
        token_mean_loss(logits, batch.labels, own, **options)  # a mean of means
    last = rank == world_size - 1  # what one rank says otherwise, all of them hear
    with pytest.raises(ValueError, match=rf"together, got {together + 1} on rank {world_size - 1}"):
        token_mean_loss(logits, batch.labels, together + last, **options)
    with pytest.raises(ValueError, match=r"gradients: expected the same on every rank, got sum, .*mean"):
        token_mean_loss(logits, batch.labels, together, group, gradients="mean" if last else "sum")
    labels = batch.labels.clone()
    labels[0] = logits.shape[1] if last else labels[0]
    with pytest.raises(ValueError, match=r"labels: expected 0 to \d+, or ignore_index = -100, got 1 others"):
        token_mean_loss(logits, labels, together, **options)
    if batch.layout == "document":
        chunk = batch.shortest_chunk
        assert batch.prepare(group, method="halo", backend="reference", window_size=(chunk, 0)).halo == chunk
        with pytest.raises(ValueError, match=rf"expected at most the {chunk} rows of a chunk .*, got {chunk + 1}"):
            batch.prepare(group, method="halo", backend="reference", window_size=(chunk + 1, 0))
    with pytest.raises(ValueError, match="batch: expected a ShardedBatch, got NoneType"):
        unshard_group(batch.input_ids, None, group)
    padded_with_0 = torch.where(batch.loss_mask, batch.labels, 0)
    with pytest.raises(ValueError, match="num_targets: expected the"):
        token_mean_loss(logits, padded_with_0, batch.num_targets, **options)
    shifted_after_sharding = torch.cat((batch.input_ids[1:], batch.input_ids.new_tensor([IGNORE])))
    with pytest.raises(ValueError, match="num_targets: expected the"):
        token_mean_loss(logits, shifted_after_sharding, batch.num_targets, **options)
    with pytest.raises(ValueError, match="gradients: expected 'sum' or 'mean'"):
        token_mean_loss(logits, batch.labels, batch.num_targets, group)
    others = [x + (rank == world_size - 1) for x in documents]  # of equal lengths
    mixed = shard_documents(others, rank, world_size, layout=batch.layout, tokens=len(batch.input_ids))
    assert forward(made_weights(), mixed, group).isnan()[mixed.loss_mask].all()
    with pytest.raises(ValueError, match=r"unsharded: .*fingerprint"):
        mixed.validate(group)
    of_another = shard_documents(documents, (rank + 1) % world_size, world_size, layout=batch.layout)
    with pytest.raises(ValueError, match="rank: expected None or that in the group"):
        of_another.prepare(group, backend="reference")
