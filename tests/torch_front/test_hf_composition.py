"""Models of transformers between ranks with checkpointing, torch.compile, FSDP2 and tensor parallelism around them."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.hf_models import (
    assert_same,
    documents,
    each_alone,
    gradients_of,
    make_model,
    results_of,
    sharded_documents,
)
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_torch import shard_documents, token_mean_loss
from zigzag_torch.hf import keep_attention, use_mesh

pytestmark = [pytest.mark.slow, pytest.mark.multigpu, pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")]


class Operators(TorchDispatchMode):
    """Writes down the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def check_checkpointing(rank, world_size):
    group = dist.group.WORLD
    expected = each_alone(make_model("gpt_oss"))
    for options in ({"use_reentrant": True}, {"use_reentrant": False}):
        model = make_model("gpt_oss")
        use_mesh(model, group)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        assert_same(f"gpt_oss with {options}", results_of(model, model, group), expected)


def check_kept_attention(rank, world_size):
    """With it attention runs once for each layer, without it twice."""
    group = dist.group.WORLD
    expected = each_alone(make_model("llama", num_hidden_layers=1))
    for kwargs, times in (({}, 2), ({"context_fn": keep_attention}, 1)):
        model = make_model("llama", num_hidden_layers=1)
        use_mesh(model, group, backend="interpret")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False} | kwargs)
        with Operators() as operators:
            ours = results_of(model, model, group, backend="interpret")
        assert_same("llama", ours, expected)
        assert operators.names.count("zigzag::parallel_forward") == times, kwargs


def check_compiled(rank, world_size):
    warnings.simplefilter("ignore")  # dynamo's own
    group = dist.group.WORLD
    model = make_model("gemma2")
    use_mesh(model, group)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same("gemma2 compiled", results_of(model, compiled, group), each_alone(make_model("gemma2")))


def check_fsdp(rank, world_size):
    """Two replicas of two ranks: each has half of the documents, and FSDP2 averages gradients over all four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    group, replica = mesh["cp"].get_group(), mesh["dp"].get_local_rank()
    expected = each_alone(make_model("mistral"))
    model = make_model("mistral")
    use_mesh(model, mesh["cp"])
    everybody = init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everybody)
    fully_shard(model, mesh=everybody)
    ids, labels = documents()
    half = slice(0, 2) if replica else slice(2, 4)
    batch = shard_documents(ids[half], group.rank(), 2, labels=labels[half], tokens=32)
    targets = sum(int((x[1:] != -100).sum()) for x in labels)
    logits = model(**batch.model_kwargs(mesh["cp"])).logits[0]
    loss = token_mean_loss(logits, batch.labels, targets, dist.group.WORLD, gradients="mean")
    loss.backward()
    gradients = {name: x.full_tensor() for name, x in gradients_of(model).items()}
    assert_same("mistral in shards", (expected[0], loss.item(), gradients), expected)


def check_tensor_parallel(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    group = mesh["cp"].get_group()
    expected = each_alone(make_model("qwen3"))
    model = make_model("qwen3")
    use_mesh(model, group)
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), columns)
    plan |= {"self_attn.o_proj": rows, "mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
    batch = sharded_documents(group)
    outputs = model(**batch.model_kwargs(group, gradients="sum"))
    outputs.loss.backward()
    loss, gradients = outputs.loss.detach(), {}
    dist.all_reduce(loss, group=group)
    for name, x in gradients_of(model).items():
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        if ".q_norm." in name or ".k_norm." in name:  # each rank has the share of its own heads
            dist.all_reduce(whole, group=mesh["tp"].get_group())
        dist.all_reduce(whole, group=group)
        gradients[name] = whole
    assert_same("qwen3 in tensor parallel", (expected[0], loss.item(), gradients), expected)


@pytest.mark.parametrize("check", [check_checkpointing, check_kept_attention, check_compiled])
def test_two_ranks(tmp_path, check):
    run_ranks(2, tmp_path, check)


@pytest.mark.parametrize("check", [check_fsdp, check_tensor_parallel])
def test_four_ranks(tmp_path, check):
    run_ranks(4, tmp_path, check)
