"""Tiny models of transformers with random weights, one for each way in which its families attend."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

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
