"""Tiny transformers models, one for each kind of attention, and their results for each document alone."""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

from zigzag_torch import shard_documents, unshard_group
from zigzag_torch.hf import use_mesh

# Products this small gain nothing from threads, which on a busy machine wait for one another, twenty times as long.
torch.set_num_threads(1)
VOCABULARY = 48
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4, "head_dim": 8}
CHUNKED = {"attention_chunk_size": 8, "no_rope_layers": [1, 0], "floor_scale": 4, "intermediate_size_mlp": 48}
CHUNKED |= {"interleave_moe_layer_step": 2, "num_local_experts": 2, "attn_temperature_tuning": True}
# Name, class of the model, and what its configuration has beside COMMON.
MODELS = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 7}),
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 5, "attn_logit_softcapping": 2.0, **MIXED}),
    "gemma3": ("Gemma3ForCausalLM", {"sliding_window": 6, **MIXED}),
    "gpt_oss": ("GptOssForCausalLM", {"sliding_window": 4, **EXPERTS, **MIXED}),
    "llama4": ("Llama4ForCausalLM", CHUNKED),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 9, **MIXED}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 11}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "modernbert": ("ModernBertForMaskedLM", {"local_attention": 8, "num_key_value_heads": 4, **MIXED}),
}


def make_model(name: str, attention: str = "eager", **changes) -> torch.nn.Module:
    """The model `name` in float32, in training mode, with the same random weights in every process."""
    kind, options = MODELS[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**(COMMON | options | changes), attn_implementation=attention)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or parameter.std() < 0.01:  # sinks and experts begin empty, norms as 1
                parameter.normal_(std=0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


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
    """Assert that two results (logits, loss, gradients) agree."""
    logits, loss, gradients = theirs
    assert (ours[0] - logits).norm() <= ROUNDING * logits.norm(), f"{name}: logits"
    assert abs(ours[1] - loss) <= ROUNDING * abs(loss), f"{name}: loss {ours[1]}, expected {loss}"
    assert ours[2].keys() == gradients.keys()
    floor = 1e-3 * max(x.norm() for x in gradients.values())  # such as the bias of keys, which no score depends on
    for parameter, expected in gradients.items():
        error = (ours[2][parameter] - expected).norm() / torch.maximum(expected.norm(), floor)
        assert error <= ROUNDING, f"{name}: gradient of {parameter} is off by {error:.1e}"


def sharded_documents(group):
    """The rows of this rank of all documents."""
    rank, world_size = (group.rank(), group.size()) if group else (0, 1)
    ids, labels = documents()
    return shard_documents(ids, rank, world_size, labels=labels, tokens=56 // world_size + 8)


def results_of(model, call, group, **options):
    """(logits in the order of the documents, loss, gradients summed over the ranks of `group`) of one call."""
    batch = sharded_documents(group)
    if type(model).__name__.endswith("CausalLM"):
        outputs = call(**batch.model_kwargs(group, gradients="sum", **options))
        loss = outputs.loss
    else:  # a masked language model expects the label of a token itself, not of the next token
        outputs = call(**batch.model_kwargs(group, **options))
        loss = loss_of(outputs.logits[0], batch.labels, batch.num_targets)
    loss.backward()
    loss, gradients = loss.detach(), gradients_of(model)
    for x in (loss, *gradients.values()) if group else ():
        dist.all_reduce(x, group=group)
    return unshard_group(outputs.logits[0], batch, group), loss.item(), gradients


def between_ranks(model, group, method="allgather", backend=None):
    """The results of `model` between the ranks of `group`, or on this device if it is None."""
    use_mesh(model, group, method=method, backend=backend)
    return results_of(model, model, group, method=method, backend=backend)
