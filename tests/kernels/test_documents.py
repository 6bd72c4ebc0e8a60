"""`plan_documents`: every token has one row, plans balance and fit, shapes are fixed, and errors say by how much."""

import dataclasses
import itertools
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zigzag_jax
import zigzag_torch
from examples.text import documents as modules
from tests.support import oracle
from zigzag_kernels.documents import check_plan, placing, plan_documents
from zigzag_kernels.documents.placing import Document, Effort, Limits, Placement

MASKS = [
    {},
    {"causal": False},
    {"window_size": (5, 0)},
    {"window_size": (3, 4), "causal": False},
    {"attention_chunk": 7},
]


def test_both_packages_publish_the_planner():
    assert zigzag_torch.plan_documents is zigzag_jax.plan_documents is plan_documents


@given(
    lengths=st.lists(st.integers(0, 70), max_size=14),
    world_size=st.integers(1, 5),
    spare=st.integers(0, 40),
    split_above=st.one_of(st.none(), st.integers(0, 70)),
    mask=st.sampled_from(MASKS),
)
@settings(max_examples=150)
def test_every_token_has_one_row(lengths, world_size, spare, split_above, mask):
    smallest = plan_documents(lengths, world_size, split_above=split_above, **mask)
    tokens = smallest.tokens + spare
    for plan in (smallest, plan_documents(lengths, world_size, tokens=tokens, split_above=split_above, **mask)):
        held = [plan.rows(rank) for rank in range(world_size)]
        assert all(len(rows) == plan.tokens for rows in held)
        real = [row for rows in held for row in rows if row >= 0]
        assert sorted(real) == [*range(sum(lengths))]
        if split_above is not None and world_size > 1:
            assert {i for i, length in enumerate(lengths) if length > split_above} <= set(plan.split)
        assert_rows_follow_the_offsets(plan, held)
        assert_positions_and_labels(plan, held)
        assert list(plan.real_rows) == [sum(row >= 0 for row in rows) for rows in held]
        assert list(plan.work) == [seen_scores(plan, rank) for rank in range(world_size)]
        mean = sum(plan.work) / world_size
        assert plan.balance == pytest.approx(max(plan.work) / mean if mean else 1)


def assert_rows_follow_the_offsets(plan, held):
    """The rows of whole documents are those of local offsets, those of split ones are zigzag chunks of global ones."""
    starts = np.cumsum([0, *plan.lengths])
    for rank, rows in enumerate(held):
        wanted = np.full(plan.tokens, -1)
        offsets, lengths = plan.whole_cu_seqlens(rank), plan.whole_lengths(rank)
        assert len(lengths) == plan.max_documents == len(offsets) - 1
        for offset, length, document in zip(offsets, lengths, plan.whole[rank], strict=False):
            wanted[offset : offset + length] = starts[document] + np.arange(length)
        offsets, lengths = np.array(plan.split_cu_seqlens), plan.split_lengths
        assert len(lengths) == plan.max_split == len(offsets) - 1
        for i, document in enumerate(plan.split):
            positions = oracle.rank_positions(offsets[i + 1] - offsets[i], rank, plan.world_size)
            first = plan.whole_tokens + offsets[i] // plan.world_size
            tokens = np.where(positions < lengths[i], starts[document] + positions, -1)
            wanted[first : first + len(positions)] = tokens
        assert rows == wanted.tolist()


def assert_positions_and_labels(plan, held):
    starts = np.cumsum([0, *plan.lengths])
    for rank, rows in enumerate(held):
        for row, position, label in zip(rows, plan.positions(rank), plan.label_rows(rank), strict=True):
            document = np.searchsorted(starts, row, side="right") - 1
            assert position == (row - starts[document] if row >= 0 else 0)
            assert label == (row + 1 if row >= 0 and row + 1 < starts[document + 1] else -1)


def seen_scores(plan, rank):
    """The scores that a dense mask leaves to the rows of `rank`."""
    causal, (left, right), chunk = plan.mask
    total = 0
    for _row, document, position, tokens in plan.pieces(rank):
        p, k = position + np.arange(tokens)[:, None], np.arange(plan.lengths[document])[None, :]
        seen = (k <= p) if causal else np.ones((tokens, plan.lengths[document]), bool)
        seen &= (left < 0) | (k >= p - left)
        seen &= (right < 0) | (k <= p + right)
        if chunk:
            seen &= k // chunk == p // chunk
        total += seen.sum()
    return total


def draws(rng, world_size, tokens):
    """Lengths of modules and of four lognormals that fill 98 % of the rows of all ranks."""
    pool = [len(text) for text in modules(10**9)]
    kinds = [lambda: rng.choice(pool)]
    for mean, sigma in ((800, 1.2), (1500, 1.0), (2000, 0.7), (3000, 1.2)):
        mu = np.log(mean) - sigma**2 / 2
        kinds.append(lambda mu=mu, sigma=sigma: max(2, int(rng.lognormvariate(mu, sigma))))
    for draw in kinds:
        lengths, left = [], int(0.98 * world_size * tokens)
        while left:
            lengths.append(min(draw(), left))
            left -= lengths[-1]
        rng.shuffle(lengths)
        yield lengths


@pytest.mark.parametrize(
    ("world_size", "tokens"),
    [(2, 8192), (4, 8192), (8, 8192), (16, 8192), (32, 8192), (64, 16384)],
)
def test_full_batches_fit_and_are_balanced(world_size, tokens):
    rng = random.Random(world_size)
    for _ in range(3):
        for lengths in draws(rng, world_size, tokens):
            plan = plan_documents(lengths, world_size, tokens=tokens)
            assert plan.balance <= 1.05
            assert plan.moved_rows <= plan.undivided.moved_rows


def test_short_documents_stay_whole_and_move_nothing():
    plan = plan_documents([100] * 64, 4, tokens=1700)
    assert not plan.split
    assert plan.moved_rows == plan.moved_bytes(8, 128) == 0
    assert plan.undivided.moved_rows == 3 * 64 * 104 // 4
    plan = plan_documents([100] * 64, 4, tokens=1700, split_above=50)
    assert len(plan.split) == 64
    assert plan.moved_rows == plan.undivided.moved_rows
    assert plan.moved_bytes(8, 128) == plan.moved_rows * 2 * 8 * 128 * 2
    with pytest.raises(ValueError, match="dtype: expected float16, bfloat16, float32, got 'int8'"):
        plan.moved_bytes(8, 128, "int8")


def test_where_documents_nearly_fill_the_ranks_the_shortest_is_split():
    """Two whole documents on each rank, and chunks of the fifth in a few rows more than the tokens need."""
    plan = plan_documents([4092, 3820, 3872, 4060, 540], 2)
    assert plan.split == (4,)
    assert plan.tokens == round(1.005 * 8192)
    assert plan.moved_rows == plan.split_tokens == 270
    assert plan.balance < 1.01
    at_least = plan_documents([4092, 3820, 3872, 4060, 540], 2, tokens=8233, split_above=4070)
    assert 0 in at_least.split


def test_one_long_document_is_split():
    plan = plan_documents([4000] + [10] * 40, 4, tokens=1110)
    assert plan.split == (0,)
    assert plan.balance < 1.01


def test_exchanges_find_what_dealing_out_does_not():
    rng = random.Random(3)
    for _ in range(3):
        lengths = [*draws(rng, 64, 8192)][3]  # four documents a rank, and 2 % of padding for all of them
        plan = plan_documents(lengths, 64, tokens=8192)
        assert plan.balance <= 1.05
        assert sorted([*itertools.chain(*plan.whole), *plan.split]) == [*range(len(lengths))]
        assert max(sum(plan.whole_lengths(rank)) for rank in range(64)) <= plan.whole_tokens


def test_a_document_goes_where_it_fits_and_not_where_work_is_least():
    documents = [Document(0, 10, 950), Document(1, 90, 1), Document(2, 20, 1)]
    assert Placement(documents, [0, 0], Limits(100, 1000, 9)).excess <= 1


def test_the_worst_rank_exchanges_a_document_for_another(monkeypatch):
    monkeypatch.setattr(placing, "EXCHANGES", 1)
    documents = [Document(i, tokens, tokens) for i, tokens in enumerate((60, 50, 50, 40))]
    placement = Placement([], [0, 0], Limits(100, 200, 2))
    for rank, document in zip((0, 0, 1, 1), documents, strict=True):
        placement.documents[rank].append(document)
        placement.rows[rank] += document.tokens
        placement.work[rank] += document.work
    placement.improve(Effort(1000))
    assert placement.rows == placement.work == [100, 100]
    assert [sum(document.tokens for document in rank) for rank in placement.documents] == [100, 100]


def test_limits_of_entries_and_of_split_rows_are_kept():
    lengths = [100] + [1] * 60
    free = plan_documents(lengths, 2, tokens=130, split_above=1000)
    assert not free.split  # though work is unequal: only what is longer than split_above is split
    assert free.max_documents > 40
    limited = plan_documents(lengths, 2, tokens=130, split_above=1000, max_documents=40)
    assert max(map(len, limited.whole)) == limited.max_documents == 40
    plan = plan_documents([400, 300, 200] + [10] * 60, 4, tokens=450, split_tokens=110)
    assert plan.split == (0,)


def test_ten_thousand_documents_on_a_thousand_ranks():
    rng = random.Random(0)
    lengths = [max(2, int(rng.lognormvariate(7, 1.2))) for _ in range(10_000)]
    tokens = int(sum(lengths) / 1024 / 0.98)
    started = time.process_time()
    plan = plan_documents(lengths, 1024, tokens=tokens)
    seconds = time.process_time() - started
    assert plan.balance <= 1.05
    assert seconds < 3  # 0.2 measured


def test_plans_of_a_size_have_arrays_of_one_shape():
    rng, shapes = random.Random(1), set()
    size = {"tokens": 600, "split_tokens": 300, "max_documents": 40, "max_split": 8}
    for _ in range(20):
        lengths = [rng.randrange(1, 90) for _ in range(30)] + [rng.randrange(300, 500)]
        plan = plan_documents(lengths, 4, **size)
        arrays = plan.rows(1), plan.whole_cu_seqlens(1), plan.whole_lengths(1), plan.split_cu_seqlens
        shapes.add((plan.whole_tokens, *map(len, arrays), len(plan.split_lengths)))
        assert plan.whole_cu_seqlens(1)[-1] <= plan.whole_tokens
        assert plan.split_cu_seqlens[-1] <= 4 * plan.split_tokens
    assert shapes == {(300, 600, 41, 40, 9, 8)}


def test_the_same_arguments_give_the_same_plan():
    lengths = [*itertools.chain.from_iterable(draws(random.Random(5), 8, 512))][:40]
    tokens = -(-sum(lengths) * 21 // 160)
    assert plan_documents(lengths, 8, tokens=tokens) == plan_documents(np.array(lengths), 8, tokens=tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [5, -1]}, r"lengths: expected numbers of tokens, got -1 \(document 1\)"),
        ({"lengths": [5, 2.0]}, r"lengths: expected numbers of tokens, got 2.0 \(document 1\)"),
        ({"lengths": 5}, "lengths: expected the tokens of each document, got 5"),
        ({"lengths": [2**30] * 3}, "lengths: expected at most 2147483647 tokens in a batch, got 3221225472"),
        ({"tokens": 10, "split_tokens": 11}, "split_tokens: expected at most tokens = 10, got 11"),
        ({"tokens": -1}, "tokens: expected an int from 0 to 1073741824, got -1"),
        ({"split_above": -1}, "split_above: expected a number of tokens, got -1"),
        ({"world_size": 0}, "world_size: expected a positive int, got 0"),
        ({"causal": 1}, "causal: expected True or False, got 1"),
        ({"tokens": 7}, r"tokens: expected rows for 30 tokens on 4 ranks, got 7 rows a rank, 2 tokens too many"),
        ({"tokens": 8}, r"padded to multiples of 8 where split, on 4 ranks, got 8 rows a rank, [1-9] tokens too many"),
        ({"tokens": 20, "max_documents": 0, "max_split": 2}, "within max_documents = 0, max_split = 2 on 4 ranks"),
        ({"max_documents": 0, "max_split": 2}, "lengths: expected documents that fit within max_documents = 0"),
        ({"lengths": {3: 4}}, "lengths: expected the tokens of each document in turn, got dict"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message):
    arguments = {"lengths": [10, 10, 10], "world_size": 4} | arguments
    with pytest.raises(ValueError, match=message):
        plan_documents(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whole": ((), ())}, "plan: expected document 1 once, whole or split, got 0 times"),
        ({"split": ()}, "plan: expected document 0 once, whole or split, got 0 times"),
        ({"split": (0, 1), "max_split": 2}, "plan: expected document 1 once, whole or split, got 2 times"),
        ({"split": (9,)}, "plan: expected numbers of its 7 documents, got 9"),
        ({"lengths": (40, 3)}, "plan: expected numbers of its 2 documents"),
        ({"lengths": (-40, 3, 9, 1, 17, 5, 8)}, "lengths: expected numbers of tokens, got -40"),
        ({"whole": "ab"}, "plan: expected numbers of documents, got whole 'ab'"),
        ({"whole": ((1, 2, 3, 4),)}, "whole: expected the documents of 2 ranks, got 1"),
        ({"max_documents": 0}, "max_documents: expected an int of at least"),
        ({"max_split": 0}, "max_split: expected an int of at least 1, got 0"),
        ({"tokens": 40}, "whole_cu_seqlens: expected to end at or before the 20 rows there are"),
        ({"split_tokens": 18}, "split_cu_seqlens: expected to end at or before the 36 rows there are"),
        ({"split_tokens": 1.5}, "split_tokens: expected a number of the 48 rows, got 1.5"),
        ({"world_size": 0}, "world_size: expected that of the plan, 0, got 2"),
    ],
)
def test_plans_that_were_changed_by_hand_are_refused(changes, message):
    """By every function that takes a plan, before a token is lost."""
    plan = plan_documents([40, 3, 9, 1, 17, 5, 8], 2, split_above=20, tokens=48)
    assert plan.serves
    with pytest.raises(ValueError, match=message):
        check_plan(dataclasses.replace(plan, **changes), 2)


@pytest.mark.parametrize("package", [zigzag_torch, zigzag_jax])
def test_a_plan_takes_no_other_layout_and_no_other_lengths(package):
    plan = plan_documents([40, 3, 9], 2, split_above=20)
    x = np.arange(max(52, 2 * plan.tokens), dtype=np.float32)
    x = torch.tensor(x) if package is zigzag_torch else x
    calls = {
        "shard": lambda **given: package.shard(x[:52], plan, 0, 2, **given),
        "unshard": lambda **given: package.unshard(x[: 2 * plan.tokens], plan, 2, **given),
        "position_ids": lambda **given: package.position_ids(plan, 0, 2, **given),
        "validate": lambda **given: package.validate(plan, 2, **given),
    }
    for name, call in calls.items():
        call()
        wrong = {"layout": "row", "row_length": 8} | ({"lengths": [40], "total": 52} if name == "validate" else {})
        for option, value in wrong.items():
            with pytest.raises(ValueError, match=f"{option}: expected .* with a plan, got"):
                call(**{option: value})
    with pytest.raises(ValueError, match="cu_seqlens: expected chunks of at least the 11 rows of a halo, got 10"):
        package.validate(plan, 2, halo=11)
    with pytest.raises(ValueError, match="max_seqlen: expected at least the 40 tokens of document 0, got 39"):
        package.validate(plan, 2, max_seqlen=39)
