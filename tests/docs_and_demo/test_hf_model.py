"""The loss of the example that trains a model of transformers, whose logits would need more memory than the model."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from examples import hf_model


class Logits(TorchDispatchMode):
    """Notes the rows of all tensors with a column for each word of the vocabulary, but not those of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.rows = weight, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        has_columns = isinstance(result, torch.Tensor) and result.shape[-1:] == self.weight.shape[:1]
        if has_columns and result.shape != self.weight.T.shape:
            self.rows.add(result.numel() // result.shape[-1])
        return result


def test_logits_are_in_memory_for_some_rows_at_a_time(monkeypatch):
    """The loss and its gradients are those of all logits at once."""
    config = hf_model.make_config("tiny-qwen3", 1, 64)
    model = hf_model.make_model("tiny-qwen3", config, "sdpa", torch.device("cpu"), seed=0)
    ids, labels = torch.randint(config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    labels[10:15] = hf_model.IGNORED
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    expected = F.cross_entropy(logits, labels, ignore_index=hf_model.IGNORED, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    monkeypatch.setattr(hf_model, "LOGIT_ROWS", 4)
    with Logits(model.get_output_embeddings().weight) as seen:
        loss = hf_model.TokenLoss(model)(labels, input_ids=ids[None], use_cache=False)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert seen.rows == {4, 2}
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
