"""The attention of transformers on one device: packing, padding and types, and refusals by module and argument."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import create_causal_mask

import zigzag_torch.hf as hf
from tests.support.hf_models import VOCABULARY, make_model
from zigzag_torch import shard_documents
from zigzag_torch.parallel.agreement import Place

IDS = [torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(2)) for length in (7, 1, 12)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    hf.register()


def flattened(**options):
    """What transformers makes of documents for attention without padding, less the labels."""
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": x.tolist()} for x in IDS])
    return {name: value for name, value in batch.items() if name != "labels"}


def padded(length=14):
    ids = torch.zeros(len(IDS), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, x in enumerate(IDS):
        ids[row, : len(x)] = x
        mask[row, : len(x)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(name):
    model = make_model(name)
    return torch.cat([model(input_ids=x[None], use_cache=False).logits[0] for x in IDS])


def assert_near(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("uses_mesh", [False, True])
@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_packed_documents_do_not_see_each_other(options, uses_mesh):
    model = make_model("mistral", "eager" if uses_mesh else "zigzag")
    if uses_mesh:
        hf.use_mesh(model, None)
    assert_near(model(**flattened(**options)).logits[0], alone("mistral"))


@pytest.mark.parametrize("name", ["llama4", "modernbert"])
def test_models_whose_attention_gets_no_positions_need_use_mesh(name):
    model = make_model(name, "zigzag")
    if name == "llama4":
        with pytest.raises(NotImplementedError, match=r"Llama4TextAttention 0: position_ids: .*use_mesh"):
            model(**flattened())
    hf.use_mesh(model, None)
    assert_near(model(**flattened()).logits[0], alone(name))


@pytest.mark.parametrize("name", ["gemma2", "modernbert"])
def test_padding_at_the_end_of_rows(name):
    batch = padded()
    logits = make_model(name, "zigzag")(**batch).logits
    assert_near(logits[batch["attention_mask"].bool()], alone(name))


def test_padding_before_a_row_is_refused():
    batch = {name: x.flip(1) for name, x in padded().items()}
    for model in (make_model("llama", "zigzag"), make_model("modernbert", "zigzag")):
        with pytest.raises(ValueError, match="attention_mask: expected padding at the end of each row"):
            model(**batch)


def test_packed_positions_with_padding_are_refused():
    batch = padded()
    batch["position_ids"] = (torch.arange(14) % 5).expand(3, -1)
    with pytest.raises(ValueError, match="position_ids: expected one document in each row of attention_mask"):
        make_model("llama", "zigzag")(**batch)


def test_a_mask_of_ones_does_not_join_packed_documents():
    batch = flattened()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert_near(make_model("llama", "zigzag")(**batch).logits[0], alone("llama"))


def test_a_batch_is_made_once_for_all_layers_and_again_for_other_values(monkeypatch):
    made = []
    prepare = hf.packing.prepare_batch
    monkeypatch.setattr(hf.packing, "prepare_batch", lambda *x, **y: made.append(1) or prepare(*x, **y))
    model, batch = make_model("llama", "zigzag"), flattened()
    expected = model(**batch).logits
    model(**batch)
    assert len(made) == 1
    batch["position_ids"].copy_(torch.arange(20)[None])
    assert not torch.allclose(model(**batch).logits, expected)
    assert len(made) == 2


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}])
def test_no_batch_outlives_the_arguments_that_it_was_made_of(options):
    batch, model = flattened(**options), make_model("llama", "zigzag")
    with torch.no_grad():
        model(**batch)
    references = [weakref.ref(x) for x in batch.values() if isinstance(x, torch.Tensor)]
    del batch
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"attention_mask": torch.ones(1, 1, 20, 20)},
            NotImplementedError,
            r"attention_mask: expected None or padding",
        ),
        ({"position_ids": torch.arange(20)[None].flip(1)}, ValueError, "position_ids: expected documents"),
        ({"cu_seq_lens_q": torch.tensor([0, 20])}, ValueError, "cu_seq_lens_k: expected the same offsets"),
        (dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 30])), ValueError, "cu_seqlens"),
        ({"cu_seq_lens_q": torch.tensor([0, 20]), "cu_seq_lens_k": torch.tensor([0, 9])}, ValueError, "no cache"),
        ({"position_bias": torch.zeros(1)}, NotImplementedError, "LlamaAttention 0: position_bias: expected None"),
        ({"output_attentions": True}, NotImplementedError, "LlamaAttention 0: output_attentions: expected False"),
    ],
)
def test_refused_arguments(change, error, words):
    batch = {"input_ids": torch.cat(IDS)[None]} | change
    model = make_model("llama", "zigzag")
    with pytest.raises(error, match=words):
        model(**batch)


def test_positions_of_several_kinds_are_refused():
    positions = torch.arange(20).expand(3, 1, 20)  # such as those of text, height and width
    with pytest.raises(NotImplementedError, match=r"position_ids: expected shape \(1, 20\) or .* got \(3, 1, 20\)"):
        hf.packing.batch_of_rows(1, 20, torch.device("cpu"), position_ids=positions)


def test_what_is_refused_in_the_config():
    dropping = make_model("qwen3", "zigzag", attention_dropout=0.1)
    with pytest.raises(NotImplementedError, match=r"Qwen3Attention 0: dropout: expected 0 .* got 0.1"):
        dropping(**flattened())
    dropping.eval()(**flattened())
    wide = {"qk_nope_head_dim": 8, "v_head_dim": 24}
    with pytest.raises(NotImplementedError, match="DeepseekV3Attention 0: value: expected a head_dim up to 16, got 24"):
        make_model("deepseek_v3", "zigzag", **wide)(**flattened())
    with pytest.raises(ValueError, match="head_dim"):
        make_model("llama", "zigzag", head_dim=12)(**flattened())


def test_cross_attention_is_refused():
    """The padding of an encoder would be taken for that of the decoder's rows, where both are equally long."""
    sizes = {"vocab_size": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, attn_implementation="zigzag"))
    ids = torch.tensor([[3, 4, 5, 1]])
    with pytest.raises(NotImplementedError, match="BartAttention 0: is_encoder_decoder: expected False, got True"):
        model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0]]), decoder_input_ids=ids)


def test_generation_is_refused_and_goes_on_with_another_attention():
    model, ids = make_model("llama", "zigzag").eval(), IDS[0][None]
    generate = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(NotImplementedError, match="past_key_values: expected None, got a cache"):
        model.generate(ids, **generate)
    hf.use_mesh(model, None)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM: past_key_values: expected None"):
        model.generate(ids, **generate)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(ids, **generate), make_model("llama").eval().generate(ids, **generate))


def test_masks_of_ones_own_are_refused():
    model = make_model("llama")
    hf.use_mesh(model, None)
    with pytest.raises(NotImplementedError, match=r"attention_mask: expected None or padding \[1, 7\], got dict"):
        model(input_ids=IDS[0][None], attention_mask={"full_attention": None})
    inputs = {"config": model.config, "inputs_embeds": torch.zeros(1, 4, 32), "attention_mask": None}
    inputs |= {"past_key_values": None}
    for overlay in (
        {"or_mask_function": lambda *x: x[2] == 0},
        {"and_mask_function": lambda *x: x[2] == 0},
        {"block_sequence_ids": torch.zeros(1, 4, dtype=torch.int64)},
    ):
        with pytest.raises(NotImplementedError, match="or_mask_function: expected None"):
            create_causal_mask(**inputs, **overlay)


def test_a_model_that_shifts_labels_itself_cannot_take_shifted_ones():
    """A masked language model takes labels as they are, and these are next tokens."""
    batch = shard_documents(IDS, 0, 1).model_kwargs(gradients="sum")
    with pytest.raises(ValueError, match="batch_size"):
        make_model("modernbert", "zigzag")(**batch)


def test_other_attention_cannot_take_a_sharded_batch():
    """Its rows are in zigzag order, and its positions those of several documents: the result would be wrong."""
    batch = shard_documents(IDS, 0, 1).model_kwargs()
    for implementation in ("eager", "sdpa"):
        with pytest.raises((RuntimeError, IndexError)):
            make_model("llama", implementation)(**batch)


@pytest.mark.parametrize("outer", [torch.bfloat16, None])
def test_one_type_under_autocast_and_after_norms_in_float32(outer):
    """Rotary embeddings and norms leave q and k in float32 beside v in bfloat16."""
    expected = alone("qwen3")
    model = make_model("qwen3", "zigzag")
    if outer is None:
        model.to(torch.bfloat16)
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
            layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: out.float())
    with torch.autocast("cpu", outer or torch.bfloat16, enabled=outer is not None):
        logits = model(**flattened()).logits[0]
    if outer is not None:
        assert (logits.float() - expected).norm() < 0.03 * expected.norm()
    assert logits.dtype == torch.bfloat16


def test_models_that_compute_across_tokens_elsewhere_are_refused(monkeypatch):
    """Between ranks; the group is never asked for anything."""
    convolving = make_model("llama")
    convolving.model.conv = nn.Conv1d(1, 1, 3)
    monkeypatch.setattr(hf.registry, "place_in", lambda group: Place("cp", 0, 2))
    cases = [
        (make_model("phi3", rope_parameters=LONG), "Phi3ForCausalLM: rope_parameters: .* 'longrope'"),
        (convolving, "LlamaForCausalLM: layer_types: .* got a convolution"),
        (make_model("mixtral", output_router_logits=True), "MixtralForCausalLM: output_router_logits"),
        (
            transformers.LlamaForSequenceClassification(make_model("llama").config),
            "LlamaForSequenceClassification: expected a base model .* got SequenceClassification",
        ),
        (
            transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SMALL)),
            "Qwen3NextForCausalLM: layer_types: .* got .*linear_attention",
        ),
    ]
    for model, words in cases:
        with pytest.raises(NotImplementedError, match=words):
            hf.use_mesh(model, "cp")
    with pytest.raises(ValueError, match=r"model: expected a model of transformers, before .* got Linear"):
        hf.use_mesh(nn.Linear(1, 1), None)
    with pytest.raises(NotImplementedError, match="T5ForConditionalGeneration: is_encoder_decoder"):
        hf.use_mesh(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), None)
    with pytest.raises(NotImplementedError, match="BloomForCausalLM: attn_implementation"):
        hf.use_mesh(
            transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=8, hidden_size=8, n_layer=1)), None
        )


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG |= {"original_max_position_embeddings": 64}
SMALL = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}
SMALL |= {"num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
SMALL |= {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SMALL |= {"shared_expert_intermediate_size": 8, "intermediate_size": 8}
T5 = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


def test_all_that_use_mesh_is_told_reaches_attention(monkeypatch):
    told, attend = {"method": "ring", "heads_k_stride": 1, "backend": "reference"}, hf.attention.zigzag_attention
    seen = []

    def recorded(*arguments, **options):
        seen.append({name: options[name] for name in told})
        return attend(*arguments, **options)

    monkeypatch.setattr(hf.attention, "zigzag_attention", recorded)
    model = make_model("llama", num_hidden_layers=2)
    hf.use_mesh(model, None, **told)
    model(**flattened())
    assert seen == [told] * 2


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_that_a_layer_does_not_pass_on_is_that_of_its_config(causal):
    """The config of a decoder counts the row itself, the config of an encoder does not."""
    layer = nn.Module()
    layer.config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    options = {"is_causal": causal, "position_ids": torch.arange(12)[None]}
    for layer.layer_idx, window in ((0, 3 if causal else 4), (1, None)):
        found, _ = hf.attention.attention_forward(layer, q, k, v, None, **options)
        wanted, _ = hf.attention.attention_forward(nn.Module(), q, k, v, None, sliding_window=window, **options)
        assert torch.equal(found, wanted)


def test_a_batch_of_ranks_needs_use_mesh_and_a_model_of_ranks_needs_a_batch(monkeypatch):
    batch = shard_documents(IDS, 0, 2, split_above=0)
    model = make_model("llama", "zigzag")
    with pytest.raises(
        ValueError, match=r"LlamaAttention 0: zigzag_batch: expected the batch of 1 ranks, got one of 2"
    ):
        model(**batch.model_kwargs())
    monkeypatch.setattr(hf.registry, "place_in", lambda group: Place("cp", 0, 2))
    hf.use_mesh(model, "cp")
    with pytest.raises(ValueError, match="LlamaForCausalLM: zigzag_batch: expected the batch of 2 ranks, got None"):
        model(**flattened())
    with pytest.raises(
        ValueError, match=r"LlamaAttention 0: attention_mask: expected that of ShardedBatch\.model_kwargs"
    ):
        model(**batch.model_kwargs() | {"attention_mask": torch.ones_like(batch.input_ids[None])})
    with pytest.raises(ValueError, match=r"LlamaAttention 0: zigzag_batch: .* got None"):
        model.model(**flattened())
    copy.deepcopy(model)
