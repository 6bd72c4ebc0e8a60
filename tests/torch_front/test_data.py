"""The data path of PyTorch: rows, labels and loss against the unsharded batch, and each mistake that it prevents."""

import dataclasses
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

import zigzag_torch
from tests.support.documents import made_documents
from zigzag_torch import ZigzagCollator, shard_documents, token_mean_loss

LAYOUTS = "document", "row"
IGNORE = -100


def next_tokens(documents, labels=None):
    """The label of every token of the concatenated batch, by its definition."""
    result = []
    for document in documents if labels is None else labels:
        result += [*document[1:].tolist(), IGNORE][: len(document)]
    return torch.tensor(result, dtype=torch.int64)


@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=6),
    world_size=st.integers(1, 4),
    spare=st.integers(0, 3),
    layout=st.sampled_from(LAYOUTS),
    masked=st.booleans(),
)
@settings(max_examples=100)
def test_rows_are_those_of_the_padded_batch(lengths, world_size, spare, layout, masked):
    if layout == "document":
        lengths = [max(length, 1) for length in lengths]  # a plan has no entries for empty documents
    documents = made_documents(lengths)
    labels = [np.where(np.arange(len(x)) < 3, IGNORE, x) for x in documents] if masked else None
    room = sum(lengths) + 2 * world_size * (len(lengths) + spare)
    tokens = 2 * -(-room // (2 * world_size))
    options = {"labels": labels, "pad_token_id": 7, "tokens": tokens, "max_documents": len(lengths) + 2}
    if layout == "document":
        options["split_above"] = 0
        if world_size == 1:
            return  # nothing is split: the next test
    batches = [shard_documents(documents, rank, world_size, layout=layout, **options) for rank in range(world_size)]
    ids, offsets = torch.tensor(np.concatenate(documents)), torch.tensor(np.cumsum([0, *lengths]))
    total, pads = world_size * tokens, {"layout": layout}
    wanted = next_tokens(documents, labels)
    padded, cu_seqlens = zigzag_torch.pad_to_zigzag(ids, offsets, world_size, total, value=7, **pads)
    padded_labels, _ = zigzag_torch.pad_to_zigzag(wanted, offsets, world_size, total, value=IGNORE, **pads)
    places = torch.cat([torch.arange(length) for length in lengths])
    padded_places, _ = zigzag_torch.pad_to_zigzag(places, offsets, world_size, total, **pads)
    for rank, batch in enumerate(batches):
        for ours, theirs in (
            (batch.input_ids, padded),
            (batch.labels, padded_labels),
            (batch.position_ids.long(), padded_places),
        ):
            assert torch.equal(ours, zigzag_torch.shard(theirs, cu_seqlens, rank, world_size, **pads))
        assert torch.equal(batch.loss_mask, batch.labels != IGNORE)
        assert torch.equal(batch.cu_seqlens[: len(cu_seqlens)], cu_seqlens)
        assert batch.lengths.tolist() == [*lengths, 0, 0]
        batch.validate()
    assert {int(batch.num_targets) for batch in batches} == {int((wanted != IGNORE).sum())}
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == int((wanted != IGNORE).sum())
    assert len({int(batch.fingerprint) for batch in batches}) == 1


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    world_size=st.integers(1, 4),
    spare=st.integers(0, 9),
    split=st.sampled_from([{}, {"split_above": 20}, {"split_tokens": 30}, {"window_size": (5, 0)}]),
    fixed=st.booleans(),
)
@settings(max_examples=100)
def test_rows_of_all_ranks_are_the_documents_whole_or_in_zigzag_chunks(lengths, world_size, spare, split, fixed):
    documents = made_documents(lengths)
    tokens = 30 + spare + -(-(sum(lengths) + 2 * world_size * len(lengths)) // world_size)
    options = split | ({"tokens": tokens + max(lengths), "max_documents": len(lengths)} if fixed else {})
    batches = [shard_documents(documents, rank, world_size, pad_token_id=60, **options) for rank in range(world_size)]
    ids = torch.tensor(np.concatenate(documents))
    wanted, places = next_tokens(documents), torch.cat([torch.arange(length) for length in lengths])
    rows = torch.cat([batch.rows for batch in batches])
    assert torch.equal(rows[rows >= 0].sort()[0], torch.arange(len(ids)))
    for rank, batch in enumerate(batches):
        real = batch.rows >= 0
        for ours, theirs, fill in (
            (batch.input_ids, ids, 60),
            (batch.labels, wanted, IGNORE),
            (batch.position_ids, places, 0),
        ):
            assert torch.equal(ours[real].long(), theirs[batch.rows[real]])
            assert (ours[~real] == fill).all()
        whole = batch.rows[: batch.whole_tokens]
        for start, end in pairwise(batch.whole_cu_seqlens.tolist()):
            assert torch.equal(whole[start:end], whole[start : start + 1] + torch.arange(end - start))
            assert start == end or places[whole[start]] == 0
        assert (whole[batch.whole_cu_seqlens[-1] :] == -1).all()
        position = zigzag_torch.position_ids(batch.cu_seqlens, rank, world_size, len(real) - batch.whole_tokens)
        split_part = slice(batch.whole_tokens, None)
        assert torch.equal(batch.position_ids[split_part], torch.where(real[split_part], position, 0))
        batch.validate()
    assert len({int(batch.fingerprint) for batch in batches}) == 1
    assert len({tuple(x.shape for x in pytree.tree_leaves(batch)[:11]) for batch in batches}) == 1
    assert len({batch.whole_tokens for batch in batches}) == 1


def test_split_rows_are_eighths_unless_the_caller_says_how_many():
    documents = made_documents([30, 41, 7, 22, 9, 16, 3])
    for options, whole in (({}, 32), ({"split_tokens": 30}, 34), ({"split_above": 0}, 0), ({"split_above": 64}, 64)):
        batch = shard_documents(documents, 0, 3, tokens=64, max_documents=7, **options)
        assert batch.whole_tokens == whole, options
    with pytest.raises(
        ValueError, match=r"tokens: expected rows for 128 tokens.* split_tokens = 2 .*, 2 tokens too many"
    ):
        shard_documents(documents, 0, 3, tokens=44, split_tokens=2)


def test_a_rank_has_entries_for_twice_its_share_of_whole_documents():
    documents = made_documents([3] * 40 + [90] * 3)
    for options, whole, split in (
        ({"max_documents": 64}, 32, 64),
        ({"max_documents": 64, "max_whole": 50, "max_split": 5}, 50, 5),
    ):
        batch = shard_documents(documents, 0, 4, tokens=130, split_tokens=4, **options)
        assert (len(batch.whole_cu_seqlens) - 1, len(batch.lengths)) == (whole, split)
    with pytest.raises(ValueError, match=r"tokens: expected rows .* max_whole = 5, max_split = 43 on 4 ranks"):
        shard_documents(documents, 0, 4, tokens=130, split_tokens=4, max_documents=43, max_whole=5)


def test_another_token_or_label_or_length_has_another_fingerprint():
    documents = [[1, 2, 3], [4, 5]]
    others = [
        {"documents": [[1, 2, 3], [4, 6]]},
        {"documents": [[1, 2], [3, 4, 5]]},
        {"documents": [[2, 1, 3], [4, 5]]},
        {"documents": documents, "labels": [[IGNORE, 2, 3], [4, 5]]},
        {"documents": documents, "labels": documents},
        {"documents": documents, "split_above": 0},
        {"documents": documents, "tokens": 9},
    ]
    known = {int(shard_documents(documents, 0, 2).fingerprint)}
    known |= {int(shard_documents(rank=1, world_size=2, **other).fingerprint) for other in others}
    assert len(known) == len(others) + 1


def test_lists_arrays_and_tensors_are_the_same_documents():
    lists = [[1, 2, 3], [4, 5], []]
    batches = [
        shard_documents([kind(x) for x in lists], 1, 2)
        for kind in (
            list,
            tuple,
            lambda x: np.array(x, np.uint16),
            lambda x: np.frombuffer(bytes(x), np.uint8),  # which nobody may write to
            lambda x: torch.tensor(x, dtype=torch.int32),
        )
    ]
    for other in batches[1:]:
        assert all(map(torch.equal, pytree.tree_leaves(batches[0])[:8], pytree.tree_leaves(other)[:8]))


def test_batches_of_a_size_have_one_shape_and_compile_once():
    shapes, counter = set(), torch._dynamo.testing.CompileCounter()
    embedding = torch.randn(50, 64, requires_grad=True)

    @torch.compile(backend=counter, fullgraph=True)
    def loss(batch):
        prepared = batch.prepare(backend="reference")
        x = embedding[batch.input_ids].unflatten(1, (4, 16))
        out = zigzag_torch.zigzag_attention(x, x, x, prepared, backend="reference")
        return token_mean_loss(out.flatten(1) @ embedding.T, batch.labels, batch.num_targets)

    for seed in range(4):
        lengths = np.random.default_rng(seed).integers(2, 12, 3 + seed)
        batch = shard_documents(made_documents(lengths, seed), 0, 1, tokens=96, max_documents=8)
        shapes.add(tuple(x.shape for x in pytree.tree_leaves(batch)[:8]))
        assert loss(batch).isfinite()
    assert len(shapes) == 1
    assert loss(dataclasses.replace(batch, num_targets=batch.num_targets + 1)).isnan()  # nobody could read it
    assert counter.frame_count == 1


def test_a_prepared_batch_knows_real_lengths_and_the_layout():
    for layout, lengths in (("document", [3, 2, 0]), ("row", None)):
        split = {"split_above": 0} if layout == "document" else {}
        batch = shard_documents([[1, 2, 3], [4, 5]], 1, 2, max_documents=3, tokens=6, layout=layout, **split)
        prepared = batch.prepare(backend="reference")
        assert (prepared.lengths if lengths is None else prepared.lengths.tolist()) == lengths
        assert (prepared.layout, prepared.row_length) == (layout, 12 if layout == "row" else 0)
    mixed = shard_documents([[1, 2, 3], [4, 5]], 1, 2, tokens=6, split_tokens=2)
    with pytest.raises(ValueError, match="group: expected that of the ranks of a plan with whole and split documents"):
        mixed.prepare()


@pytest.mark.parametrize(
    ("reach", "halo"),
    [({"window_size": (2, 0)}, 2), ({"attention_chunk": 4}, 3), ({"window_size": (5, 0), "max_seqlen": 2}, 1)],
)
def test_a_batch_is_prepared_for_halos(reach, halo):
    batch = zigzag_torch.shard_documents([[1] * 12, [2] * 16], 0, 2, split_above=0)
    for prepared in (batch.prepare, lambda **options: batch.model_kwargs(**options)["zigzag_batch"]):
        assert prepared(method="halo", **reach).halo == halo


def test_a_batch_takes_halos_where_they_serve_and_move_less():
    """Halos serve windows up to the shortest chunk that needs one, here of 8 rows."""
    batch = shard_documents([[1] * 80, [2] * 60], 0, 4, split_above=0)
    plan = zigzag_torch.plan_documents([80, 60], 4, split_above=0)
    for reach, method in (
        ({}, "allgather"),
        ({"window_size": (8, 0)}, "halo"),
        ({"window_size": (9, 0)}, "allgather"),
    ):
        assert batch.prepare(**reach).method == method
        assert batch.to("cpu").model_kwargs(**reach)["zigzag_batch"].method == method
        assert zigzag_torch.prepare_batch(plan, 0, 4, **reach).method == method
    many = shard_documents([[1] * 8] * 9, 0, 2, split_above=0)  # in chunks of 2 rows: halos would move as much
    assert [many.prepare(window_size=(window, 0)).method for window in (1, 2)] == ["halo", "allgather"]
    rows = shard_documents([[1] * 80, [2] * 60], 0, 4, layout="row")
    assert [rows.prepare(window_size=(window, 0)).method for window in (18, 19)] == ["halo", "allgather"]


def test_a_batch_moves_is_pinned_and_is_a_pytree(monkeypatch):
    batch = shard_documents([[1, 2, 3]], 1, 2)
    assert batch.to("meta").input_ids.device.type == "meta"
    assert batch.to("meta").rank == 1
    doubled = pytree.tree_map(lambda x: x * 2 if isinstance(x, torch.Tensor) else x, batch)
    assert torch.equal(doubled.input_ids, batch.input_ids * 2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)
    assert torch.equal(batch.pin_memory().lengths, batch.lengths + 1)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_collator_makes_the_same_batch_after_a_pickle(labelled):
    collate = ZigzagCollator(rank=1, world_size=2, tokens=16, max_documents=4, pad_token_id=9)
    documents = [[1, 2, 3], [4, 5, 6, 7], [8]]
    labels = [[IGNORE, 2, 3], [4, IGNORE, 6, 7], [8]] if labelled else None
    examples = (
        [{"input_ids": x, "labels": y} for x, y in zip(documents, labels, strict=True)] if labelled else documents
    )
    wanted = shard_documents(documents, 1, 2, labels=labels, tokens=16, max_documents=4, pad_token_id=9)
    loader = DataLoader(examples, batch_size=3, collate_fn=pickle.loads(pickle.dumps(collate)))
    (batch,) = loader
    leaves = zip(pytree.tree_leaves(batch), pytree.tree_leaves(wanted), strict=True)
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in leaves)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_size": (9, 0)}], ids=str)
def test_both_parts_of_a_plan_make_the_attention_of_the_whole_batch(options):
    lengths, world_size = [61, 9, 14, 3, 20, 7, 11], 3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 16, generator=generator) for heads in (4, 2, 2))
    offsets = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    options |= {"backend": "reference"}
    wanted = zigzag_torch.zigzag_attention(q, k, v, offsets, **options)
    mask = {name: x for name, x in options.items() if name != "backend"}
    plan = zigzag_torch.plan_documents(lengths, world_size, tokens=56, split_tokens=30, **mask)
    assert plan.split
    assert any(plan.whole)
    rows = [torch.tensor(plan.rows(rank)) for rank in range(world_size)]
    parts = [(own[: plan.whole_tokens], own[plan.whole_tokens :]) for own in rows]
    k_all, v_all = (torch.cat([x[split] for _, split in parts]) for x in (k, v))  # -1, padding, is seen by nobody
    out = torch.full_like(wanted, float("nan"))
    for rank, (whole, split) in enumerate(parts):
        local = torch.tensor(plan.whole_cu_seqlens(rank), dtype=torch.int32)
        of_whole = zigzag_torch.zigzag_attention(q[whole], k[whole], v[whole], local, **options)
        batch = zigzag_torch.prepare_batch(
            plan.split_cu_seqlens, rank, world_size, lengths=plan.split_lengths, backend="reference"
        )
        of_split = zigzag_torch.zigzag_attention_gathered(q[split], k_all, v_all, batch, rank, world_size, **options)
        for part, result in ((whole, of_whole), (split, of_split)):
            out[part[part >= 0]] = result[part >= 0]
    torch.testing.assert_close(out, wanted)


def test_a_plan_deals_out_rows_positions_and_puts_them_together():
    lengths, world_size = [61, 9, 14, 3, 20, 7, 11], 3
    plan = zigzag_torch.plan_documents(lengths, world_size, tokens=56, split_tokens=30)
    x = torch.randn(sum(lengths), 2, requires_grad=True)
    rows = [zigzag_torch.shard(x, plan, rank, world_size) for rank in range(world_size)]
    for rank, own in enumerate(rows):
        real = torch.tensor(plan.rows(rank)) >= 0
        assert own.shape == (56, 2)
        assert (own[~real] == 0).all()
        assert zigzag_torch.position_ids(plan, rank, world_size).tolist() == plan.positions(rank)
    together = zigzag_torch.unshard(torch.cat(rows), plan, world_size)
    assert torch.equal(together, x)
    together.sum().backward()
    assert (x.grad == 1).all()
    zigzag_torch.validate(plan, world_size)
    overfull = dataclasses.replace(plan, lengths=(61, 99, *plan.lengths[2:]))
    for call, message in (
        (lambda: zigzag_torch.validate(overfull, 3), "whole_cu_seqlens: expected to end at or before the 26 rows"),
        (lambda: zigzag_torch.validate(plan, 2), "world_size: expected that of the plan, 3, got 2"),
        (lambda: zigzag_torch.shard(x[1:], plan, 0, 3), "x: expected the 125 tokens of the plan, got shape"),
        (lambda: zigzag_torch.shard(x, plan, torch.tensor(0), 3), "rank: expected an int with a plan"),
        (lambda: zigzag_torch.unshard(x, plan, 3), "x: expected the 168 rows of all ranks in the plan, got shape"),
        (lambda: zigzag_torch.position_ids(plan, 0, 3, 9), "tokens: expected None or those of the plan, 56, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_loss_is_the_mean_of_all_targets_and_no_mean_of_means():
    logits = torch.randn(6, 9, requires_grad=True)
    labels = torch.tensor([1, IGNORE, 3, IGNORE, 8, 0])
    loss = token_mean_loss(logits, labels, 4)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0])
    assert token_mean_loss(logits, torch.full((6,), IGNORE), 0) == 0
    one = torch.tensor([IGNORE, 2, *[IGNORE] * 4])
    torch.testing.assert_close(token_mean_loss(logits, one, 1), -logits.log_softmax(1)[1, 2])
    for unknown in (-1, 9):
        with pytest.raises(ValueError, match="labels: expected 0 to 8, or ignore_index = -100, got 1 others"):
            token_mean_loss(logits, torch.where(labels == 8, unknown, labels), 4)
    with pytest.raises(ValueError, match=r"labels: expected integers \(6,\) as in logits, got shape \(6,\) bool"):
        token_mean_loss(logits, labels > 0, 6)


ALREADY = [np.array([2, 3, 4, IGNORE]), np.array([6, 7, IGNORE])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ALREADY}, "labels: expected the label of every token in its own place.* shifted here"),
        ({"labels": [[1, 2, 3, 4]]}, "labels: expected those of 2 documents, got 1"),
        ({"labels": [[1, 2, 3, 4], [1, 2]]}, r"labels: expected one for each of 3 tokens, got 2 \(document 1\)"),
        ({"documents": [[1.5]]}, r"documents: expected integers \[n\], got shape \(1,\) float32 \(document 0\)"),
        ({"documents": [[1], [[2]]]}, r"documents: expected integers \[n\], got shape \(1, 1\) int64 \(document 1\)"),
        ({"documents": "text"}, "documents: expected a list of documents, got str"),
        ({"documents": [1, 2]}, r"documents: expected integers \[n\], got shape \(\) int64 \(document 0\)"),
        ({"documents": [["a"]]}, r"documents: expected integers \[n\], got list \(document 0\)"),
        ({"tokens": 3, "split_above": 0}, "got 3 rows a rank, 1 tokens too many"),
        ({"split_tokens": 2, "layout": "row"}, "split_tokens: expected None with layout 'row', got 2"),
        ({"split_tokens": 9, "tokens": 8}, "split_tokens: expected at most tokens = 8, got 9"),
        ({"tokens": 4, "world_size": 1, "rank": 0}, "7 tokens on 1 ranks, got 4 rows a rank, 3 tokens too many"),
        ({"tokens": 5, "layout": "row"}, "tokens: expected an even number of rows with layout 'row', got 5"),
        ({"max_documents": 1}, "max_documents: expected at least the 2 documents of the batch, got 1"),
        ({"rank": 2}, "rank: expected 0 to 1, got 2"),
        ({"layout": "rows"}, "layout: expected 'document' or 'row', got 'rows'"),
        ({"pad_token_id": None}, "pad_token_id: expected an integer, got None"),
    ],
)
def test_errors_of_documents(arguments, message):
    arguments = {"documents": [[1, 2, 3, 4], [5, 6, 7]], "rank": 1, "world_size": 2} | arguments
    with pytest.raises(ValueError, match=message):
        shard_documents(**arguments)


def test_a_label_may_be_any_other_than_the_next_token():
    documents = [[1, 1, 1], [2, 3]]
    for labels in (documents, [[5, 5, 5], [6, 6]], [[IGNORE] * 3, [IGNORE] * 2]):
        shard_documents(documents, 0, 1, labels=labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens: expected an int of at least 1, got 0"),
        ({"max_documents": None}, "max_documents: expected an int of at least 1, got None"),
        ({"world_size": 2}, "rank: expected the rank to make batches for, as world_size is 2, got None"),
        ({"tokens": 3, "rank": 0, "world_size": 2, "layout": "row"}, "tokens: expected an even number of rows"),
        ({"ignore_index": 0.5}, "ignore_index: expected an integer, got 0.5"),
        ({"group": 5}, "group: expected a torch.distributed process group"),
    ],
)
def test_errors_of_the_collator(arguments, message):
    with pytest.raises(ValueError, match=message):
        ZigzagCollator(**{"tokens": 8, "max_documents": 2} | arguments)


def test_examples_of_a_collator_are_all_alike():
    collate = ZigzagCollator(tokens=8, max_documents=2)
    with pytest.raises(ValueError, match="examples: expected 'labels' in all 2 or in none, got 1"):
        collate([{"input_ids": [1], "labels": [1]}, {"input_ids": [2]}])
    with pytest.raises(ValueError, match=r"examples: expected a mapping with 'input_ids', got list at \[1\]"):
        collate([{"input_ids": [1]}, [2]])
    whole = {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]}
    assert collate([whole]).num_targets == 2
    with pytest.raises(ValueError, match=r"attention_mask: expected documents without padding, got 1 zeros in .*\[1\]"):
        collate([whole, whole | {"attention_mask": [1, 1, 0]}])
    with pytest.raises(ValueError, match=r"position_ids: expected one document .* got \[0, 1, 0\] in examples\[0\]"):
        collate([whole | {"position_ids": [0, 1, 0]}])
    with pytest.raises(ValueError, match=r"seq_lengths: expected one document in each example, got several in .*\[0\]"):
        collate([whole | {"seq_lengths": [2, 1]}])
