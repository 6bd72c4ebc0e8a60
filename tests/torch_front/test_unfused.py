"""The unfused path against the float64 oracle, piece by piece and as a whole."""

import inspect
from dataclasses import replace

import pytest
import torch

import zigzag_torch
from tests.support import oracle
from tests.support.cases import BENCH, CASES, RANGES, Case, make_inputs
from tests.support.closeness import assert_close
from tests.support.machine import GPU
from tests.support.pieces import DEVICE, grouped, rank_oracle, rank_tensors, tensor
from zigzag_torch.compat import flash2

SELECTED = [case for case in CASES if case.tags.isdisjoint(BENCH if GPU else BENCH | {"gpu"})]
ONE_TOKEN = Case(name="one token in every chunk", world_size=2, lengths=(4, 4), heads=4, kv_heads=2)
CASE = Case(name="chunks", world_size=3, lengths=(12, 0, 30, 6), heads=4, kv_heads=2)


def check_rank(case, rank, **options):
    """Results and gradients of one rank, padding left out, against the oracle."""
    inputs = make_inputs(case)
    used = case.tokens - case.padding
    q, kv, dout, dlse = rank_tensors(case, rank, inputs)
    out, lse, _ = grouped(case, rank, q, kv, **options)
    assert out.shape == (used, case.heads, case.head_dim)
    dq, dkv = torch.autograd.grad((out, lse), (q, kv), (dout, dlse))
    results = {"out": out, "lse": lse, "dq": dq, "dk": dkv[0], "dv": dkv[1]}
    exact, straightforward = (
        rank_oracle(case, rank, inputs, arithmetic) for arithmetic in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    for name, result in results.items():
        result = result.detach().float().cpu().numpy()
        assert_close(f"rank {rank} of {case.world_size}: {name}", result, exact[name], straightforward[name])


@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_every_rank_matches_the_oracle(case):
    for rank in range(case.world_size):
        check_rank(case, rank)


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_any_number_of_groups(n_chunks, causal):
    """Chunks that share a group are sequences of their own in one call."""
    case = Case(name="groups", world_size=3, lengths=CASE.lengths, heads=4, kv_heads=2, causal=causal)
    for rank in range(3):
        check_rank(case, rank, n_chunks=n_chunks, deterministic=True)


@pytest.mark.parametrize("n_chunks", [1, 2, 6])
@pytest.mark.parametrize("window_size", [(0, -1), (4, 0), (7, 2), (-1, 3), (3, -1), (99, 99)])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(causal, window_size, n_chunks):
    case = replace(CASE, causal=causal, window_size=window_size)
    for rank in range(3):
        check_rank(case, rank, n_chunks=n_chunks)


def test_the_pieces_on_an_example():
    """Two sequences of 16 and 8 tokens on four ranks; rank 1 holds chunks 1 and 6."""
    local = tensor([0, 4, 6], "int32")
    q = torch.arange(6.0, device=DEVICE).reshape(6, 1, 1)
    q_list, cu_seqlens_list, indices_list = zigzag_torch.split_q_by_zigzag_chunk_index(q, local, 4, 1)
    assert [x.flatten().tolist() for x in q_list] == [[0, 1, 4], [2, 3, 5]]
    assert [x.tolist() for x in cu_seqlens_list] == [[0, 2, 3], [0, 2, 3]]
    assert [x.tolist() for x in indices_list] == [[0, 1, 4], [2, 3, 5]]
    slices = zigzag_torch.compute_kv_slices_for_groups(local, 1, 6, 4, cu_seqlens_list)
    assert [ranges for ranges, _ in slices] == [[(0, 4), (16, 18)], [(0, 14), (16, 23)]]
    assert [cu_seqlens.tolist() for _, cu_seqlens in slices] == [[0, 4, 6], [0, 14, 21]]


def test_keys_in_position_order():
    cu_seqlens, padding = [0, 16, 16, 40], 1
    rows = torch.from_numpy(oracle.gathered_rows(cu_seqlens, 4, padding)).to(DEVICE)
    buffer = rows.expand(2, -1)[..., None, None].contiguous()
    ordered = torch.arange(44, device=DEVICE).expand(2, -1)[..., None, None]
    offsets = tensor(cu_seqlens, "int32")
    local = zigzag_torch.rearrange_kv_from_zigzag_to_contiguous(buffer, 4, offsets // 4)
    assert torch.equal(local, ordered)
    without_padding = torch.cat([part[:, :-1] for part in buffer.split(11, dim=1)], dim=1)
    for bounds in (offsets, offsets // 4):  # global or local
        assert torch.equal(
            zigzag_torch.rearrange_kv_from_zigzag_to_contiguous(without_padding, 4, bounds), ordered[:, :40]
        )


def test_what_does_not_fit_is_refused():
    q, local = torch.zeros(6, 4, 16, device=DEVICE), tensor([0, 6], "int32")
    kv = torch.zeros(2, 18, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="n_chunks: expected 1 to 2 \\* world_size = 6, got 7"):
        zigzag_torch.split_q_by_zigzag_chunk_index(q, local, 3, 0, 7)
    with pytest.raises(ValueError, match=r"multiples of 2 \* world_size = 6, got 15"):
        zigzag_torch.split_q_by_zigzag_chunk_index(q, tensor([0, 5], "int32"), 3, 0)
    with pytest.raises(ValueError, match="cu_seqlens: expected to end at or before the 18 rows there are, got 36"):
        zigzag_torch.rearrange_kv_from_zigzag_to_contiguous(kv, 3, tensor([0, 6, 12], "int32"))
    case = Case(name="refused", world_size=3, lengths=(18,), heads=4, kv_heads=2)
    for option, error, message in (
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: only 0 is supported, got 0.1"),
        ({"window_size": (64, -2)}, ValueError, r"window_size: expected .* got \(64, -2\)"),
        ({"alibi_slopes": q}, NotImplementedError, "alibi_slopes: only None"),
        ({"nheads": 8}, ValueError, r"chunk_q_list: expected shape \(3, 8, 16\) .* got \(3, 4, 16\)"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale: expected a positive finite number, got -1.0"),
        ({"causal": None}, ValueError, "causal: expected True or False, got None"),
    ):
        with pytest.raises(error, match=message):
            grouped(case, 0, q, kv, **option)
    with pytest.raises(ValueError, match="kv_buffer: expected a multiple of world_size = 3 rows, got 17"):
        grouped(case, 0, q, kv[:, :-1])
    with pytest.raises(ValueError, match=r"kv_buffer: expected .* got shape"):
        grouped(case, 0, q, kv[0])


def test_a_deterministic_backward_leaves_the_global_setting_as_it_was():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with flash2.deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with flash2.deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(GPU, reason="the operator itself is tested here")
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", [ONE_TOKEN.name, "w2-empty-runs", "w4", "w2-window-left"])
def test_how_flash_attention_is_called(name, deterministic, monkeypatch):
    """With a dense stand-in for the operators, which have no gradient of lse: arguments, and that gradient."""

    def forward(  # noqa: PLR0917  (stands in for an operator)
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
        window_size_left=-1, window_size_right=0,
    ):  # fmt: skip
        assert not dropout_p
        assert not return_debug_mask
        assert cum_seq_q.diff().max() <= max_q
        assert cum_seq_k.diff().max() <= max_k
        assert max_q > 1
        mask = mask_of(is_causal, window_size_left, window_size_right)
        results = dense(query, key, value, cum_seq_q, cum_seq_k, mask, scale)
        return *results, None, None, None

    def backward(  # noqa: PLR0917  (stands in for an operator)
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale, window_size_left=-1, window_size_right=0,
    ):  # fmt: skip
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            mask = mask_of(is_causal, window_size_left, window_size_right)
            results = dense(*leaves, cum_seq_q, cum_seq_k, mask, scale)
        for given, expected in zip((out, logsumexp), results, strict=True):
            torch.testing.assert_close(given, expected)
        return torch.autograd.grad(results[0], leaves, grad_out)

    def mask_of(is_causal, left, right):
        assert right == 0
        return flash2.Mask(is_causal, (left, -1))

    dense = flash2.reference.varlen_attention
    for name_of_operator, stand_in in (("_flash_attention_forward", forward), ("_flash_attention_backward", backward)):
        schema = getattr(torch.ops.aten, name_of_operator).default._schema
        positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        assert positional == list(inspect.signature(stand_in).parameters)[: len(positional)]
        monkeypatch.setattr(torch.ops.aten, name_of_operator, stand_in)
    monkeypatch.setattr(flash2, "is_flash", lambda *_: True)
    case = next(case for case in (ONE_TOKEN, *CASES, *RANGES) if case.name == name)
    for rank in range(case.world_size):
        check_rank(case, rank, deterministic=deterministic)
