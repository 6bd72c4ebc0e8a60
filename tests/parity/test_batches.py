"""A prepared batch serves the rank that it was prepared for, and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import zigzag_jax
import zigzag_torch
from tests.support.machine import GPU
from tests.support.spread import mesh_of

PACKAGES = {
    "torch": (zigzag_torch, functools.partial(torch.tensor, device="cuda" if GPU else "cpu")),
    "jax": (zigzag_jax, jnp.asarray),
}
W = 2
OFFSETS = np.array([0, 8, 24], np.int32)


@pytest.fixture(params=PACKAGES)
def package(request):
    """(module, a function that makes its arrays)."""
    return PACKAGES[request.param]


def attention(package, batch, rank, backend):
    module, array = package
    q, kv = (array(np.ones((rows, 1, 16), np.float32)) for rows in (12, 24))
    return module.zigzag_attention_gathered(q, kv, kv, batch, rank, W, return_lse=True, backend=backend)


def all_nan(results):
    return all(np.isnan(np.asarray(x.tolist())).all() for x in results)


def test_the_rank_must_be_given(package):
    module, array = package
    with pytest.raises(ValueError, match="rank: expected the rank to prepare for, as world_size is 2, got None"):
        module.prepare_batch(array(OFFSETS), world_size=W)
    assert module.prepare_batch(array(OFFSETS), backend="reference").world_size == 1


def test_a_rank_that_the_host_knows_is_compared(package):
    module, array = package
    for rank in (0, np.int64(0)):
        batch = module.prepare_batch(array(OFFSETS), rank, W, backend="reference")
        attention(package, batch, 0, "reference")
        with pytest.raises(ValueError, match="rank: expected that of the prepared batch, 0, got 1"):
            attention(package, batch, 1, "reference")


@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize("prepared_by_number", [False, True])
def test_a_rank_that_only_the_device_knows_gives_nan_if_it_is_another(
    package, with_tables, prepared_by_number, kernel_backend
):
    module, array = package
    backend = kernel_backend if with_tables else "reference"
    ranks = [array(np.array([rank], np.int32)) for rank in range(W)]
    batch = module.prepare_batch(array(OFFSETS), 0 if prepared_by_number else ranks[0], W, backend=backend)
    assert (batch.segments is not None) == with_tables
    assert all_nan(attention(package, batch, ranks[1], backend))
    right = attention(package, batch, ranks[0], backend)
    assert not all_nan(right)
    for ours, theirs in zip(right, attention(package, array(OFFSETS), 0, backend), strict=True):
        np.testing.assert_array_equal(np.asarray(ours.tolist()), np.asarray(theirs.tolist()))


def test_jit_forgets_the_number_and_compares_on_the_device():
    batches = [zigzag_jax.prepare_batch(OFFSETS, rank, W, backend="reference") for rank in range(W)]
    package = PACKAGES["jax"]
    attend = jax.jit(lambda batch: attention(package, batch, 1, "reference"))
    assert all_nan(attend(batches[0]))
    assert not all_nan(attend(batches[1]))
    assert attend._cache_size() == 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)  # batches of all ranks are one pytree
    out, _ = jax.vmap(lambda batch: attention(package, batch, batch.rank, "reference"))(stacked)
    assert not np.isnan(out).any()


def test_another_rank_gives_nan_gradients(kernel_backend):
    device = "cuda" if GPU else "cpu"
    cu_seqlens = torch.tensor(OFFSETS, device=device)
    batch = zigzag_torch.prepare_batch(cu_seqlens, 0, W, backend=kernel_backend)
    q, k, v = (torch.ones(rows, 1, 16, device=device, requires_grad=True) for rows in (12, 24, 24))
    rank = torch.tensor([1], device=device)
    out = zigzag_torch.zigzag_attention_gathered(q, k, v, batch, rank, W, backend=kernel_backend)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isnan().all()


WRONGLY_PREPARED = {
    "lengths shape": ({"lengths": [8]}, r"lengths: expected shape \[N\] = \(2,\), one for each sequence .* got \(1,\)"),
    "lengths float": (
        {"lengths": np.array([1.0, 2.0])},
        "lengths: expected dtype int32, or other integers, got float64",
    ),
    "lengths too long": (
        {"lengths": [8, 17]},
        r"lengths: expected real lengths from 0 to the 16 rows of the sequence, got 17 \(sequence 1\)",
    ),
    "lengths above int32": (
        {"lengths": np.array([2**32 + 8, 16])},
        r"lengths: expected integers that int32 holds, got 4294967304 at \[0\]",
    ),
    "layout": ({"layout": "tokens"}, "layout: expected 'document' or 'row', got 'tokens'"),
    "row_length of documents": ({"row_length": 24}, "row_length: expected None with layout 'document', got 24"),
    "rows of documents": ({"rows": 2}, "rows: expected 1 with layout 'document', got 2"),
    "no row_length": ({"layout": "row"}, "row_length: expected a multiple of 2 \\* world_size = 4.* got None"),
    "uneven row_length": ({"layout": "row", "row_length": 6}, "row_length: expected a multiple of .* = 4.* got 6"),
    "rows": ({"layout": "row", "row_length": 24, "rows": 0}, "rows: expected a positive number of packed rows, got 0"),
    "across a border": (
        {"layout": "row", "row_length": 12, "rows": 2},
        r"cu_seqlens: expected documents within a row of 12 tokens, got 8 to 24 \(document 1\)",
    ),
}


@pytest.mark.parametrize("case", WRONGLY_PREPARED)
def test_what_cannot_be_prepared_is_named(package, case):
    module, _ = package
    changed, message = WRONGLY_PREPARED[case]
    with pytest.raises(ValueError, match=message):
        module.prepare_batch(OFFSETS, 0, W, backend="reference", **changed)


def test_lengths_on_the_host_are_held_by_int32_whatever_has_the_offsets(package):
    module, array = package
    for length in (2**32 + 8, -(2**32) + 8):
        with pytest.raises(ValueError, match=f"lengths: expected integers that int32 holds, got {length} at"):
            module.prepare_batch(array(OFFSETS), lengths=np.array([length, 16]), backend="reference")


def test_rows_that_one_rank_does_not_cut_are_rows_all_the_same(package):
    module, array = package
    prepare = functools.partial(module.prepare_batch, array(OFFSETS), layout="row", backend="reference")
    for rows in ({}, {"row_length": 24}, {"row_length": 15, "rows": 2}):
        assert prepare(**rows).layout == "row"
    for row_length in (24.0, -4, True, "24"):
        with pytest.raises(ValueError, match=f"row_length: expected the tokens of one .* got {row_length!r}"):
            prepare(row_length=row_length)
    for rows in (0, 1.0, "1"):
        with pytest.raises(ValueError, match=f"rows: expected a positive number of packed rows, got {rows!r}"):
            prepare(row_length=24, rows=rows)


def test_the_layout_and_the_rows_are_those_of_the_batch(package):
    module, array = package
    prepare = functools.partial(module.prepare_batch, array(OFFSETS), 0, W, backend="reference")
    q, kv = (array(np.ones((rows, 1, 16), np.float32)) for rows in (12, 24))

    def attend(batch, **options):
        return module.zigzag_attention_gathered(q, kv, kv, batch, 0, W, backend="reference", **options)

    for given, asked in (({}, {"layout": "row"}), ({"layout": "row", "row_length": 24}, {})):
        layouts = given.get("layout", "document"), asked.get("layout", "document")
        with pytest.raises(
            ValueError, match="layout: expected that of the prepared batch, '{}', got '{}'".format(*layouts)
        ):
            attend(prepare(**given), **asked)
    with pytest.raises(ValueError, match=r"q: expected 24 rows of each rank, as row_length and rows .* say, got 12"):
        attend(prepare(layout="row", row_length=24, rows=2), layout="row")
    attend(prepare(layout="row", row_length=24), layout="row")


def test_real_lengths_make_padding_harmless_without_a_causal_mask(package):
    """Which is refused where tokens would attend to it."""
    module, array = package
    x, cu_seqlens = module.pad_to_zigzag(
        array(np.ones((10, 1, 16), np.float32)), array(np.array([0, 3, 10], np.int32)), W
    )
    q = x[:6]

    def attend(lengths):
        return module.zigzag_attention_gathered(q, x, x, lengths, 0, W, causal=False, backend="reference")

    with pytest.raises(ValueError, match="causal: expected True with the cu_seqlens of pad_to_zigzag"):
        attend(cu_seqlens)
    batch = module.prepare_batch(cu_seqlens, 0, W, lengths=array(np.array([3, 7], np.int32)), backend="reference")
    assert not all_nan([attend(batch)])


REFUSED = "causal: expected True with the cu_seqlens of pad_to_zigzag, got False"


def test_copies_of_a_batch_remember_that_its_offsets_count_padding():
    """Such as the batch that `Batch.to` makes, or one that was prepared in `torch.inference_mode`."""
    x, cu_seqlens = zigzag_torch.pad_to_zigzag(torch.ones(10, 1, 16), [0, 3, 10], W)
    batch = zigzag_torch.prepare_batch(cu_seqlens, 0, W, backend="reference")
    copies = [pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, batch)]
    with torch.inference_mode():
        copies.append(zigzag_torch.prepare_batch(cu_seqlens, 0, W, backend="reference"))
    for copy in copies:
        attend = functools.partial(zigzag_torch.zigzag_attention_gathered, x[:6], x, x, copy, 0, W, backend="reference")
        attend()
        with pytest.raises(ValueError, match=REFUSED):
            attend(causal=False)


def test_whole_arrays_of_jax_are_refused_if_real_tokens_would_attend_to_padding():
    x, cu_seqlens = zigzag_jax.pad_to_zigzag(np.ones((10, 1, 16), np.float32), np.array([0, 3, 10]), W)
    make = functools.partial(zigzag_jax.make_zigzag_attention, mesh_of(W), backend="reference")
    full, lengths = make(causal=False), np.array([3, 7], np.int32)
    for given in (cu_seqlens, full.prepare_batch(cu_seqlens)):
        with pytest.raises(ValueError, match=REFUSED):
            jax.eval_shape(lambda x, given=given: full(x, x, x, given), x)
    for attend, given in (
        (full, full.prepare_batch(cu_seqlens, lengths)),
        (make(causal=False, window_size=(4, 0)), cu_seqlens),
        (make(), cu_seqlens),
    ):
        jax.eval_shape(lambda x, attend=attend, given=given: attend(x, x, x, given), x)


def test_rows_that_were_never_sharded_are_refused_if_the_whole_batch_is_known(package):
    module, array = package
    q, kv = (array(np.ones((rows, 1, 16), np.float32)) for rows in (24, 48))
    known = {"unsharded": array(np.arange(24)), "backend": "reference"}
    batch = module.prepare_batch(array(OFFSETS), 0, W, **known)
    with pytest.raises(ValueError, match="q: expected the rows of one of 2 ranks, got the 24 rows that `unsharded`"):
        module.zigzag_attention_gathered(q, kv, kv, batch, 0, W, backend="reference")
    attention(package, batch, 0, "reference")
    alone = module.prepare_batch(array(OFFSETS), **known)
    module.zigzag_attention_gathered(q, q, q, alone, 0, 1, backend="reference")
