"""Models of transformers between ranks: logits, loss and all gradients are those of each document alone with eager."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.hf_models import MODELS, VOCABULARY, make_model
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_torch import shard_documents, unshard_group
from zigzag_torch.hf import use_mesh

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
# Float32 sums in another order. A layer whose window is one key too long changes some gradient by more than 1e-2.
ROUNDING = 1e-5
LENGTHS = 13, 1, 30, 6
IGNORED = -100


@functools.cache
def documents():
    """(documents, their labels in their own places): the second has none, the third none at its start."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    labels = [x.clone() for x in ids]
    labels[1][:] = IGNORED
    labels[2][:14] = IGNORED
    return ids, labels


def loss_of(logits, labels, targets):
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / targets


def gradients_of(model):
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def each_alone(model):
    """(logits of all documents, loss, gradients) of eager attention to one document after another."""
    next_tokens = [torch.cat((x[1:], torch.tensor([IGNORED]))) for x in documents()[1]]
    targets = sum(int((x != IGNORED).sum()) for x in next_tokens)
    logits, loss = [], 0.0
    for ids, labels in zip(documents()[0], next_tokens, strict=True):
        logits.append(model(input_ids=ids[None], use_cache=False).logits[0])
        own = loss_of(logits[-1], labels, targets)
        own.backward()
        loss += own.item()
    gradients = gradients_of(model)
    model.zero_grad()
    return torch.cat(logits).detach(), loss, gradients


def assert_same(name, ours, theirs):
    """Both are (logits, loss, gradients)."""
    logits, loss, gradients = theirs
    assert (ours[0] - logits).norm() <= ROUNDING * logits.norm(), f"{name}: logits"
    assert abs(ours[1] - loss) <= ROUNDING * abs(loss), f"{name}: loss {ours[1]}, expected {loss}"
    assert ours[2].keys() == gradients.keys()
    floor = 1e-3 * max(x.norm() for x in gradients.values())  # such as the bias of keys, which no score depends on
    for parameter, expected in gradients.items():
        error = (ours[2][parameter] - expected).norm() / torch.maximum(expected.norm(), floor)
        assert error <= ROUNDING, f"{name}: gradient of {parameter} is off by {error:.1e}"


def between_ranks(name, model, group, method="allgather", backend=None):
    """(logits in the order of the documents, loss, gradients summed over the ranks) of the ranks of `group`."""
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    ids, labels = documents()
    batch = shard_documents(ids, rank, world_size, labels=labels, tokens=56 // world_size + 8)
    use_mesh(model, group, method=method, backend=backend)
    predicts_next = type(model).__name__.endswith(
        "CausalLM"
    )  # a masked language model would take its labels as they are
    options = {"gradients": "sum"} if predicts_next else {}
    outputs = model(**batch.model_kwargs(group, method=method, backend=backend, **options))
    loss = outputs.loss if predicts_next else loss_of(outputs.logits[0], batch.labels, batch.num_targets)
    loss.backward()
    loss, gradients = loss.detach(), gradients_of(model)
    for x in (loss, *gradients.values()) if group else ():
        dist.all_reduce(x, group=group)
    return unshard_group(outputs.logits[0], batch, group), loss.item(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_one_device(name):
    expected = each_alone(make_model(name))
    assert_same(name, between_ranks(name, make_model(name), None), expected)


def check_models(rank, world_size, names, methods, backend):
    group = dist.group.WORLD
    for i, name in enumerate(names):
        model = make_model(name)
        expected = each_alone(model)
        assert_same(name, between_ranks(name, model, group, methods[i % len(methods)], backend), expected)


@pytest.mark.multigpu
def test_two_ranks(tmp_path):
    run_ranks(2, tmp_path, check_models, list(MODELS), ("allgather", "ring"), None)


@pytest.mark.slow
@pytest.mark.multigpu
def test_four_ranks(tmp_path):
    run_ranks(4, tmp_path, check_models, list(MODELS), ("ring", "allgather"), None)


@pytest.mark.slow
@pytest.mark.multigpu
def test_two_ranks_with_the_kernels(tmp_path):
    """Sinks and windows, chunks, and values that are narrower than keys."""
    run_ranks(2, tmp_path, check_models, ["gpt_oss", "llama4", "deepseek_v3"], ("allgather",), "interpret")
