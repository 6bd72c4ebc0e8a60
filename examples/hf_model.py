"""Models of transformers for `train_hf.py`: their configuration, their sharding, and their loss of a batch."""

import contextlib
import functools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from zigzag_torch import ShardedBatch, hf

IGNORED = -100
LOGIT_ROWS = 4096  # whose logits are in memory at a time: the logits of all rows would be larger than the model
_TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_8B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
_SMALL = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
CONFIGS = {
    "tiny-qwen3": functools.partial(Qwen3Config, **_TINY),
    "tiny-llama": functools.partial(LlamaConfig, **_TINY),
    "qwen3-0.6b": functools.partial(Qwen3Config, **_SMALL, intermediate_size=3072, num_hidden_layers=28),
    "qwen3-8b": functools.partial(Qwen3Config, **_8B, intermediate_size=12288, num_hidden_layers=36),
    "llama3-8b": functools.partial(LlamaConfig, **_8B, intermediate_size=14336, num_hidden_layers=32),
}
VOCABULARIES = {"qwen3-0.6b": 151_936, "qwen3-8b": 151_936, "llama3-8b": 128_256}


def make_config(name: str, layers: int | None, context: int) -> PreTrainedConfig:
    """The configuration of this name or in this directory, with so many layers if a number is given."""
    if name in CONFIGS:
        sizes = {"vocab_size": VOCABULARIES[name], "rope_theta": 1e6} if name in VOCABULARIES else {}
        config = CONFIGS[name](**sizes, max_position_embeddings=context, tie_word_embeddings=False)
    else:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    if layers is not None:
        config.num_hidden_layers = layers
        config.layer_types = config.layer_types[:layers] if getattr(config, "layer_types", None) else None
    return config


def make_model(name: str, config: PreTrainedConfig, attention: str, device: torch.device, seed: int) -> torch.nn.Module:
    """The model in float32, the same on all processes: random, or from a directory that has weights."""
    torch.manual_seed(seed)
    kwargs = {"attn_implementation": "eager" if attention == "zigzag" else attention, "dtype": torch.float32}
    if any(Path(name).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(name, config=config, local_files_only=True, **kwargs).to(device)
    with device:
        return AutoModelForCausalLM.from_config(config, **kwargs)


class TokenLoss(torch.nn.Module):
    """A model and its loss: the cross entropy of the next tokens, summed over the rows of this process.

    With `offload` the inputs of checkpointed layers wait in the memory of the host for the backward pass.
    """

    def __init__(self, model: torch.nn.Module, *, offload: bool = False):
        super().__init__()
        self.model, self.offload = model, offload

    def forward(self, labels: torch.Tensor, **inputs) -> torch.Tensor:
        kept = torch.autograd.graph.save_on_cpu(pin_memory=labels.is_cuda) if self.offload else contextlib.nullcontext()
        with kept:
            hidden = self.model.get_decoder()(**inputs).last_hidden_state[0]
        parts = zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
        return torch.stack([checkpoint(self._part, *part, use_reentrant=False) for part in parts]).sum()

    def _part(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def checkpointed(model: torch.nn.Module, what: str) -> None:
    """Let the backward pass compute layers again: "none" of them, "full" ones, or all but "attention"."""
    if what != "none":
        kwargs = {"use_reentrant": False} | ({"context_fn": hf.keep_attention} if what == "attention" else {})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def in_parts(model: torch.nn.Module, rows: int) -> None:
    """Let the MLP of each layer take `rows` rows at a time, and take them again in the backward pass."""
    for layer in model.get_decoder().layers:
        layer.mlp.forward = functools.partial(_by_parts, layer.mlp.forward, rows)


def _by_parts(forward, rows: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return `forward` of `hidden [1, T, hidden_size]`, with the activations of one part in memory at a time."""
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in hidden.split(rows, 1)], 1)


def sharded(model: torch.nn.Module, mesh: DeviceMesh, dtype: torch.dtype, *, offload: bool = False) -> TokenLoss:
    """The model with its weights in shards over all processes of `mesh`, which compute in `dtype`."""
    whole = TokenLoss(model, offload=offload)
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for layer in model.get_decoder().layers:
        fully_shard(layer, **options)
    fully_shard(whole, **options)
    return whole.train()


def model_inputs(batch: ShardedBatch, attention: str, group: DeviceMesh, method: str) -> dict:
    """Return the inputs of the model: for zigzag with the prepared batch, otherwise whole rows of this process."""
    if attention == "zigzag":
        return batch.model_kwargs(group, method=method)
    return {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], "use_cache": False}


def step_work(config: PreTrainedConfig, weights: int, batch: ShardedBatch, device: torch.device) -> tuple[int, int]:
    """Return the tokens of a step on all processes, and its operations, not counting any that are done again.

    `weights` are the elements of all matrices that each token is multiplied by. The host waits for all processes.
    """
    tokens = int((batch.rows >= 0).sum())
    scores = sum(n * (n + 1) / 2 for n in batch.whole_cu_seqlens.diff().tolist())
    scores += sum(n * (n + 1) / 2 for n in batch.lengths.tolist()) / batch.world_size
    totals = torch.tensor([tokens, scores], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    tokens, scores = totals.tolist()
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * scores
    return int(tokens), int(3 * (2 * weights * tokens + attention))


def mean_loss(total: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss whose gradients FSDP averages, the mean loss of the targets of all processes)."""
    sums = torch.stack((total.detach(), (labels != IGNORED).sum().float()))
    dist.all_reduce(sums)
    targets = sums[1].clamp(min=1)
    return total * (dist.get_world_size() / targets), sums[0] / targets
