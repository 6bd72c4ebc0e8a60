"""The loss of the example that trains a model of transformers, and how it takes less memory than the plain one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from examples import hf_model

TOKENS = 30


class Rows(TorchDispatchMode):
    """Notes the rows of all tensors with so many columns as `weight` has rows, but not those of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.shape, self.rows = weight.shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        has_columns = isinstance(result, torch.Tensor) and result.shape[-1:] == self.shape[:1]
        if has_columns and result.shape != self.shape[::-1]:
            self.rows.add(result.numel() // result.shape[-1])
        return result


@functools.cache
def tokens():
    """(ids, labels) of one document, some of whose tokens are no targets."""
    ids, labels = torch.randint(256, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    labels[10:15] = hf_model.IGNORED
    return ids, labels


def make_model():
    config = hf_model.make_config("tiny-qwen3", 2, 64)
    return hf_model.make_model("tiny-qwen3", config, "sdpa", torch.device("cpu"), seed=0)


@functools.cache
def plain():
    """(loss, gradients) of all logits at once, with nothing computed again."""
    ids, labels = tokens()
    model = make_model()
    loss = F.cross_entropy(
        model(input_ids=ids[None], use_cache=False).logits[0], labels, ignore_index=hf_model.IGNORED, reduction="sum"
    )
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def results(model, **options):
    """(loss, gradients) of the example."""
    ids, labels = tokens()
    loss = hf_model.TokenLoss(model.train(), **options)(labels, input_ids=ids[None], use_cache=False)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def assert_plain(found):
    torch.testing.assert_close(found[0], plain()[0])
    for ours, theirs in zip(found[1], plain()[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_logits_are_in_memory_for_some_rows_at_a_time(monkeypatch):
    model = make_model()
    monkeypatch.setattr(hf_model, "LOGIT_ROWS", 4)
    with Rows(model.get_output_embeddings().weight) as seen:
        found = results(model)
    assert seen.rows == {4, 2}
    assert_plain(found)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_an_mlp_is_in_memory_for_some_rows_at_a_time(checkpointing):
    model = make_model()
    hf_model.checkpointed(model, checkpointing)
    hf_model.in_parts(model, 4)
    with Rows(model.get_decoder().layers[0].mlp.up_proj.weight) as seen:
        found = results(model)
    assert seen.rows == {4, 2}
    assert_plain(found)


def test_inputs_of_layers_wait_in_the_memory_of_the_host(monkeypatch):
    packed = []

    def save_on_cpu(pin_memory):
        return saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", save_on_cpu)
    model = make_model()
    hf_model.checkpointed(model, "full")
    assert_plain(results(model, offload=True))
    inputs = (1, TOKENS, model.config.hidden_size)
    assert packed.count(inputs) >= model.config.num_hidden_layers
    assert not any(shape[-1:] == (model.config.intermediate_size,) for shape in packed)
