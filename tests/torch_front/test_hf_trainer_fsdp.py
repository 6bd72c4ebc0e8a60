"""The Trainer of transformers with weights in shards over all ranks, as its own arguments ask for it."""

import numpy as np
import pytest
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.support.hf_trainer import (
    as_launched,
    curve,
    examples,
    make_trainer,
    order,
    order_of_two,
    plain_curve,
    training_arguments,
)
from tests.support.machine import GPU, GPUS
from tests.support.processes import run_ranks
from zigzag_torch.hf import keep_attention

pytestmark = [pytest.mark.slow, pytest.mark.multigpu]
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}}
CHECKPOINTING = {"use_reentrant": False, "context_fn": keep_attention}
# Float32 sums in another order, of a GPU beside a CPU; Adam makes more of it with every step.
TOLERANCE = 1e-4 if GPU else 1e-5
SIZES = {"num_hidden_layers": 2}


def train(directory, data, group, **changes):
    """The Trainer after training, whose weights were in shards."""
    arguments = training_arguments(directory, **(FSDP | changes))
    if not GPU:  # accelerate shards between GPUs alone, and takes these processes for some
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    trainer = make_trainer(arguments, data, group, **SIZES)
    trainer.train()
    return trainer


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_sharded(model, world_size):
    """Assert that all ranks together hold each weight once, so that gradients are averaged over all of them."""
    for name, weight in model.named_parameters():
        assert isinstance(weight, DTensor), name
        assert (weight.device_mesh.size(), weight.placements) == (world_size, (Shard(0),)), name


def check_group(rank, world_size, directory):
    """All ranks share each batch; the backward pass computes layers again but for attention."""
    as_launched(rank, world_size)
    data, group = examples("unequal"), dist.group.WORLD
    with pytest.raises(NotImplementedError, match=f"cp_size: expected 1, got {world_size}"):
        train(directory, data, group, parallelism_config=ParallelismConfig(cp_size=world_size))
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": CHECKPOINTING}
    trainer = train(directory, data, group, max_steps=6, **checkpointing)
    assert_sharded(trainer.model, world_size)
    assert_same(curve(trainer), plain_curve(data, order()[:6], **SIZES))


def check_checkpoints(rank, world_size, directory):
    """Training goes on from checkpoints of both kinds."""
    as_launched(rank, world_size)
    data = examples("unequal")
    expected = plain_curve(data, order()[:4], **SIZES)
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        saving["fsdp_config"] = FSDP["fsdp_config"] | {"state_dict_type": kind}
        trainer = train(directory / kind, data, dist.group.WORLD, **saving)
        trainer.train(resume_from_checkpoint=str(directory / kind / "checkpoint-2"))
        assert_same(curve(trainer), expected)


def check_replicas(rank, world_size, directory):
    """Groups of half the ranks take documents of their own, and accelerate is told of the ranks of all groups."""
    as_launched(rank, world_size)
    device = "cuda" if GPU else "cpu"
    mesh = init_device_mesh(device, (2, world_size // 2), mesh_dim_names=("dp", "cp"))
    data = examples("equal")
    shards = ParallelismConfig(dp_shard_size=world_size)
    trainer = train(directory, data, mesh["cp"], max_steps=6, parallelism_config=shards)
    assert_sharded(trainer.model, world_size)
    assert_same(curve(trainer), plain_curve(data, order_of_two()[:6], **SIZES))


@pytest.mark.parametrize("check", [check_group, check_replicas, check_checkpoints])
def test_two_ranks(tmp_path, check):
    run_ranks(2, tmp_path, check, tmp_path / "trainer", backend="nccl" if GPU else "gloo")


@pytest.mark.skipif(0 < len(GPUS) < 4, reason="needs four GPUs, or none")
def test_replicas_of_two_ranks(tmp_path):
    run_ranks(4, tmp_path, check_replicas, tmp_path / "trainer", backend="nccl" if GPU else "gloo")
