"""Models of transformers between ranks: logits, loss and all gradients are those of each document alone with eager."""

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.support.hf_models import (
    MODELS,
    assert_same,
    between_ranks,
    each_alone,
    gradients_of,
    make_model,
    results_of,
    sharded_documents,
)
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_torch.hf import use_mesh

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")


@pytest.mark.parametrize("name", MODELS)
def test_one_device(name):
    expected = each_alone(make_model(name))
    assert_same(name, between_ranks(make_model(name), None), expected)


def check_models(rank, world_size, names, methods, backend):
    group = dist.group.WORLD
    for i, name in enumerate(names):
        model = make_model(name)
        expected = each_alone(model)
        assert_same(name, between_ranks(model, group, methods[i % len(methods)], backend), expected)


def check_models_and_averages(rank, world_size):
    """Of `DistributedDataParallel`, which averages the gradients of shares whose mean is the loss.

    Halos serve the layers with windows, while the others gather.
    """
    check_models(rank, world_size, list(MODELS), ("allgather", "ring"), None)
    group, model = dist.group.WORLD, make_model("gemma2")
    expected = each_alone(model)
    use_mesh(model, group)
    assert_same("gemma2", results_of(model, model, group, method="halo", window_size=(4, 0)), expected)
    model = make_model("llama")
    expected = each_alone(make_model("llama"))
    use_mesh(model, group)
    averaged = DistributedDataParallel(model)
    loss = averaged(**sharded_documents(group).model_kwargs(group, gradients="mean")).loss
    loss.backward()
    dist.all_reduce(loss.detach_())
    assert_same("llama", (expected[0], loss.item() / world_size, gradients_of(model)), expected)


@pytest.mark.multigpu
def test_two_ranks(tmp_path):
    run_ranks(2, tmp_path, check_models_and_averages)


@pytest.mark.slow
@pytest.mark.multigpu
def test_four_ranks(tmp_path):
    run_ranks(4, tmp_path, check_models, list(MODELS), ("ring", "allgather"), None)


@pytest.mark.slow
@pytest.mark.multigpu
def test_two_ranks_with_the_kernels(tmp_path):
    """Sinks and windows, chunks, and values that are narrower than keys."""
    run_ranks(2, tmp_path, check_models, ["gpt_oss", "llama4", "deepseek_v3"], ("allgather",), "interpret")
