"""The row layout in both frameworks: the order of others who cut packed rows, random packings, and faults by name."""

import functools
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import zigzag_jax
import zigzag_torch
from tests.support import oracle
from tests.support.cases import Case, make_inputs
from tests.support.frameworks import jax_host_array
from zigzag_kernels import layout

PACKAGES = {"torch": (zigzag_torch, torch.tensor), "jax": (zigzag_jax, jax_host_array)}
WORLD_SIZES = [1, 2, 3, 4, 8]
RANDOM_PACKINGS = {zigzag_torch: 25, zigzag_jax: 2}  # JAX compiles each anew


@pytest.fixture(params=PACKAGES)
def package(request):
    """(module, a function that makes its arrays)."""
    return PACKAGES[request.param]


def traced(module, function):
    """`function` where values are not at hand: under `jax.jit`, or under `vmap` of one batch."""
    if module is zigzag_jax:
        return jax.jit(function)
    return lambda *arrays: torch.vmap(function)(*(x[None] for x in arrays))[0]


def maxtext_order(length, world_size):
    """Tokens of a row as MaxText's `reorder_sequence` (its load-balanced context parallelism) puts them: groups of
    `length / (2 cp)`, the first half of them and the second half backwards, in turn."""
    groups = np.arange(length).reshape(2 * world_size, -1)
    first, second = np.arange(world_size), np.arange(2 * world_size - 1, world_size - 1, -1)
    return groups[np.stack((first, second), 1).reshape(-1)].reshape(-1)


def transformer_engine_order(length, world_size):
    """The ranks' tokens one after another as TransformerEngine's dual chunk swap deals them out (in PyTorch
    `get_batch_on_this_cp_rank`): of `2 cp` chunks rank `r` selects those at `[r, 2 cp - r - 1]`."""
    chunks = torch.arange(length).view(2 * world_size, length // (2 * world_size))
    index = [torch.tensor([rank, 2 * world_size - rank - 1]) for rank in range(world_size)]
    return torch.cat([chunks.index_select(0, x).view(-1) for x in index]).numpy()


def head_tail_order(length, world_size):
    """Tokens of a row as PyTorch's `context_parallel` orders them (its head-tail load balancer): for each rank
    `Q[r * k : (r + 1) * k]` from the head and as many from the tail, `Q[-(r + 1) * k : -r * k]`."""
    tokens, k = list(range(length)), length // (2 * world_size)
    order = []
    for rank in range(world_size):
        order += tokens[rank * k : (rank + 1) * k] + tokens[length - (rank + 1) * k : length - rank * k]
    return np.array(order)


@pytest.mark.parametrize("rule", [maxtext_order, transformer_engine_order, head_tail_order])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_hold_what_others_give_them(package, world_size, rule):
    module, array = package
    length = 2 * world_size * 3
    x, cu_seqlens = array(np.arange(length)), array(np.array([0, 3, 4, length - 1], np.int32))
    shards = [module.shard(x, cu_seqlens, rank, world_size, layout="row") for rank in range(world_size)]
    ours = np.concatenate([np.asarray(shard) for shard in shards])
    np.testing.assert_array_equal(ours, rule(length, world_size))


class Packing(NamedTuple):
    """Documents `cu_seqlens` in `rows` packed rows of `row_length` tokens; the last row may end with padding."""

    world_size: int
    row_length: int
    rows: int
    cu_seqlens: np.ndarray

    @property
    def total(self):
        return self.rows * self.row_length

    @property
    def tokens(self):
        return self.total // self.world_size


def random_packing(rng, world_size):
    """Documents of any lengths, empty ones too, at any place in up to three rows."""
    row_length, rows = 2 * world_size * int(rng.integers(1, 8)), int(rng.integers(1, 4))
    offsets = []
    for row in range(rows):
        end = row_length if row + 1 < rows or rng.random() < 0.3 else int(rng.integers(0, row_length + 1))
        cuts = np.sort(rng.integers(0, end + 1, int(rng.integers(0, 6))))
        offsets += [row * row_length + cut for cut in (0, *cuts, end)]
    return Packing(world_size, row_length, rows, np.array(offsets, np.int32))


def packing_of(lengths, world_size, row_length, rows):
    return Packing(world_size, row_length, rows, np.cumsum([0, *lengths]).astype(np.int32))


EDGES = [
    packing_of((12,), 2, 12, 1),  # one document that is the whole row
    packing_of((3, 3, 3, 3), 2, 12, 1),  # borders of documents are those of chunks
    packing_of((1,) * 9, 2, 12, 1),
    packing_of((2, 8), 2, 12, 1),  # over all borders, and padding
    packing_of((), 2, 8, 1),  # padding alone
    packing_of((8, 5, 3), 2, 8, 3),  # a last row of padding alone
    packing_of((0, 0, 5, 0, 3, 0, 0, 8, 0), 2, 8, 2),
    packing_of((), 2, 8, 0),
]


def document_of(packing, row):
    """The document of a row of the unsharded batch, None for padding."""
    inside = (packing.cu_seqlens[:-1] <= row) & (row < packing.cu_seqlens[1:])
    return int(inside.argmax()) if inside.any() else None


def check_packing(module, array, packing):
    world_size, row_length = packing.world_size, packing.row_length
    form = {"layout": "row", "row_length": row_length}
    cu_seqlens, x = array(packing.cu_seqlens), np.arange(1, packing.total + 1)
    rows_of_batch = x.reshape(packing.rows, row_length)
    shards, packed = [], []
    options = oracle.Options(layout="row", row_length=row_length)
    for rank in range(world_size):
        mine = oracle.rows_of_rank(packing.cu_seqlens, rank, world_size, packing.total, options)
        shards.append(np.asarray(module.shard(array(x), cu_seqlens, rank, world_size, **form)))
        np.testing.assert_array_equal(shards[-1], x[mine])
        if packing.rows % row_length:
            packed.append(np.asarray(module.shard(array(rows_of_batch), cu_seqlens, rank, world_size, **form)))
            np.testing.assert_array_equal(packed[-1], x[mine].reshape(packing.rows, -1))
        documents = [document_of(packing, row) for row in mine]
        wanted = [
            0 if document is None else row - packing.cu_seqlens[document]
            for row, document in zip(mine, documents, strict=True)
        ]
        positions = module.position_ids(cu_seqlens, rank, world_size, packing.tokens, **form)
        np.testing.assert_array_equal(np.asarray(positions), np.array(wanted, np.int32))
        assert np.asarray(positions).dtype == np.int32
        check_pieces(module, packing, rank, documents, cu_seqlens)
    gathered = array(np.concatenate(shards))
    np.testing.assert_array_equal(np.asarray(module.unshard(gathered, cu_seqlens, world_size, **form)), x)
    if packed and (packing.rows * world_size) % row_length:
        gathered = array(np.concatenate(packed))
        restored = module.unshard(gathered, cu_seqlens, world_size, **form)
        np.testing.assert_array_equal(np.asarray(restored), rows_of_batch)
    module.validate(cu_seqlens, world_size, packing.total, **form)


def check_pieces(module, packing, rank, documents, cu_seqlens):
    world_size, chunk = packing.world_size, packing.row_length // (2 * packing.world_size)
    ours = module.local_cu_seqlens(cu_seqlens, world_size, layout="row", row_length=packing.row_length, rank=rank)
    ours = np.asarray(ours)
    assert ours.dtype == np.int32
    if world_size == 1:
        np.testing.assert_array_equal(ours, packing.cu_seqlens)
        return
    assert len(ours) == 2 * len(packing.cu_seqlens) - 1
    assert ours[0] == 0
    pieces = groupby((i // chunk, document) for i, document in enumerate(documents) if document is not None)
    wanted = [len(list(piece)) for _, piece in pieces]
    sizes = np.diff(ours)
    assert sizes[sizes != 0].tolist() == wanted


@pytest.mark.parametrize("packing", EDGES, ids=lambda packing: "-".join(map(str, (packing.rows, *packing.cu_seqlens))))
def test_documents_at_borders(package, packing):
    check_packing(*package, packing)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_random_packings(package, world_size):
    module, array = package
    rng = np.random.default_rng(world_size)
    for _ in range(RANDOM_PACKINGS[module]):
        check_packing(module, array, random_packing(rng, world_size))


def test_rules_of_ints_are_those_of_arrays():
    rng = np.random.default_rng(0)
    for world_size in WORLD_SIZES:
        packing = random_packing(rng, world_size)
        rows = np.arange(packing.tokens)
        for rank in range(world_size):
            held = layout.packed_row(rows, packing.row_length, np.array(rank), world_size)
            assert held.tolist() == [layout.packed_row(int(i), packing.row_length, rank, world_size) for i in rows]
            back = layout.gathered_packed_row(held, packing.row_length, packing.tokens, world_size)
            np.testing.assert_array_equal(back, rank * packing.tokens + rows)


def test_trailing_dimensions_and_gradients(package):
    module, array = package
    x = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    cu_seqlens, form = array(np.array([0, 5, 8, 14], np.int32)), {"layout": "row", "row_length": 8}
    shards = [np.asarray(module.shard(array(x), cu_seqlens, rank, 2, **form)) for rank in range(2)]
    assert shards[0].shape == (2, 4, 3)
    np.testing.assert_array_equal(shards[1][1], x[1, 2:6])
    restored = module.unshard(array(np.concatenate(shards)), cu_seqlens, 2, **form)
    np.testing.assert_array_equal(np.asarray(restored), x)
    flat = module.shard(array(x.reshape(16, 3)), cu_seqlens, 0, 2, **form)
    np.testing.assert_array_equal(np.asarray(flat), shards[0].reshape(8, 3))

    ones = np.zeros_like(x)
    ones[:, [0, 1, 6, 7]] = 1  # what rank 0 holds of each row
    if module is zigzag_jax:
        gradient = jax.grad(lambda x: module.shard(x, cu_seqlens, 0, 2, **form).sum())(jnp.asarray(x))
    else:
        leaf = torch.tensor(x, requires_grad=True)
        module.shard(leaf, cu_seqlens, 0, 2, **form).sum().backward()
        gradient = leaf.grad
    np.testing.assert_array_equal(np.asarray(gradient), ones)


def test_a_shape_that_may_be_either_is_refused(package):
    """`[16, 8]` is two rows of eight tokens with eight features, or sixteen rows of eight tokens."""
    module, array = package
    x, form = array(np.zeros((16, 8), np.float32)), {"layout": "row", "row_length": 8}
    cu_seqlens = array(np.array([0, 8, 16], np.int32))
    with pytest.raises(ValueError, match=r"^x: expected \[total, ...\], or \[rows, 8, ...\] for packed rows of 8 tok"):
        module.shard(x, cu_seqlens, 0, 2, **form)
    assert module.shard(x.reshape(2, 8, 8), cu_seqlens, 0, 2, **form).shape == (2, 4, 8)
    with pytest.raises(ValueError, match=r"^x: expected \[total, ...\], or \[rows, 4, ...\] for packed rows of 8 tok"):
        module.unshard(array(np.zeros((16, 4), np.float32)), cu_seqlens, 2, **form)


FAULTS = {
    "across rows": ([0, 20, 48], "cu_seqlens: expected documents within a row of 16 tokens, got 0 to 20 .document 0."),
    "decreasing": ([0, 16, 8], "cu_seqlens: expected no decrease"),
    "start": ([4, 16], "cu_seqlens: expected to begin with 0"),
    "too long": ([0, 16, 32, 48, 64], r"(x: expected \[total|tokens: expected at least the 32 local rows)"),
    "padding in a row before the last": ([0, 15], "cu_seqlens: expected to end in the last row of 16 tokens, at 32"),
    "wrapping around": ([0, 2**31 - 4, -(2**31)], "(cu_seqlens: expected|x: expected|tokens: expected)"),
}


@pytest.mark.parametrize("name", ["shard", "unshard", "position_ids", "local_cu_seqlens"])
@pytest.mark.parametrize("fault", FAULTS)
def test_impossible_documents_are_refused_or_poison(package, name, fault):
    module, array = package
    offsets, message = FAULTS[fault]
    if name == "local_cu_seqlens" and ("long" in fault or "padding" in fault):
        return  # it knows no number of rows
    cu_seqlens, form = array(np.array(offsets, np.int32)), {"layout": "row", "row_length": 16}
    x = array(np.ones((48, 3), np.float32))
    helper = {
        "shard": lambda cu_seqlens, rank: module.shard(x, cu_seqlens, rank, 2, **form),
        "unshard": lambda cu_seqlens, rank: module.unshard(x, cu_seqlens, 2, **form),
        "position_ids": lambda cu_seqlens, rank: module.position_ids(cu_seqlens, rank, 2, 24, **form),
        "local_cu_seqlens": lambda cu_seqlens, rank: module.local_cu_seqlens(cu_seqlens, 2, rank=rank, **form),
    }[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        helper(cu_seqlens, 0)
    result = np.asarray(traced(module, helper)(cu_seqlens, array(np.array([0], np.int32))))
    wanted = np.nan if name in ("shard", "unshard") else -1
    np.testing.assert_array_equal(result, np.full_like(result, wanted))
    possible = array(np.array([0, 7, 16, 32, 33], np.int32))
    result = np.asarray(traced(module, helper)(possible, array(np.array([1], np.int32))))
    np.testing.assert_array_equal(result, np.asarray(helper(possible, 1)))
    if name != "unshard":
        result = np.asarray(traced(module, helper)(possible, array(np.array([2], np.int32))))
        np.testing.assert_array_equal(result, np.full_like(result, wanted))


def test_arguments_of_the_row_layout(package):
    module, array = package
    x, cu_seqlens = array(np.zeros(48, np.float32)), array(np.array([0, 20, 47], np.int32))
    shard = functools.partial(module.shard, x, cu_seqlens, 0, 2)
    for options, message in (
        ({"layout": "rows"}, "layout: expected 'document' or 'row', got 'rows'"),
        ({"row_length": 48}, "row_length: expected None with layout 'document', got 48"),
        ({"layout": "row", "row_length": 6}, "row_length: expected packed rows of a multiple of 2 . world_size = 4"),
        ({"layout": "row", "row_length": 20}, "row_length: expected a divisor of the 48 tokens that all rows have"),
        ({"layout": "row", "row_length": 0}, "row_length: expected the tokens of a packed row over all ranks, 1 to"),
        ({"layout": "row", "row_length": 8.0}, "row_length: expected the tokens of a packed row over all ranks, 1 to"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            shard(**options)
    with pytest.raises(
        ValueError, match=r"^x: expected packed rows of a multiple of 2 . world_size = 4 tokens, got 46"
    ):
        module.shard(x[:46], array(np.array([0, 46], np.int32)), 0, 2, layout="row")
    local = functools.partial(module.local_cu_seqlens, cu_seqlens, 2, layout="row")
    with pytest.raises(
        ValueError, match=r"^rank: expected the rank whose pieces to count, as layout is 'row', got None"
    ):
        local(row_length=48)
    with pytest.raises(ValueError, match=r"^row_length: expected the tokens of a packed row over all ranks, got None"):
        local(rank=0)
    for tokens, message in ((10, "tokens: expected at least the 24"), (23, "tokens: expected packed rows of a multi")):
        with pytest.raises(ValueError, match=f"^{message}"):
            module.position_ids(cu_seqlens, 0, 2, tokens, layout="row")


def test_positions_read_the_number_of_rows_if_they_must(package):
    module, array = package
    cu_seqlens = array(np.array([0, 3, 10], np.int32))
    positions = functools.partial(module.position_ids, cu_seqlens, 1, 2, layout="row")
    assert np.asarray(positions(row_length=12)).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.asarray(positions(row_length=12)).tolist() == np.asarray(positions(6)).tolist()
    with pytest.raises(
        ValueError, match=r"^tokens: expected packed rows of a multiple of 2 . world_size = 4 tokens, got"
    ):
        positions()


def test_only_the_end_is_padded(package):
    module, array = package
    x, offsets = np.arange(1, 14, dtype=np.int32), np.array([0, 5, 6, 13], np.int32)
    pad = functools.partial(module.pad_to_zigzag, array(x), array(offsets), 3, value=-100, layout="row")
    for options, total in (({}, 18), ({"total": 30}, 30), ({"row_length": 24}, 24)):
        padded, cu_seqlens = pad(**options)
        assert np.asarray(padded).tolist() == [*x, *[-100] * (total - 13)]
        np.testing.assert_array_equal(np.asarray(cu_seqlens), offsets)
        module.validate(cu_seqlens, 3, total, layout="row", row_length=options.get("row_length"))
        assert np.asarray(module.unpad(padded, cu_seqlens, 3, layout="row")).tolist() == x.tolist()
    for options, message in (
        ({"total": 15}, "total: expected a multiple of 2 . world_size = 6, at least 13, got 15"),
        ({"total": 12}, "total: expected a multiple of 2 . world_size = 6, at least 13, got 12"),
        ({"total": 36, "row_length": 18}, "total: expected a multiple of row_length = 18, at least 13 and at most 18"),
        ({"row_length": 10}, "row_length: expected packed rows of a multiple of 2 . world_size = 6 tokens, got 10"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            pad(**options)
    # No document has padding, and so attention without a mask is as right as any.
    q, cu_seqlens = module.pad_to_zigzag(array(np.ones((3, 1, 16), np.float32)), [0, 3], 1, 4, layout="row")
    module.zigzag_attention_gathered(q, q, q, cu_seqlens, 0, 1, causal=False, backend="reference")


def test_validate_says_what_is_wrong(package):
    module, array = package
    validate = functools.partial(module.validate, array(np.array([0, 7, 16, 20], np.int32)), 2)
    validate(32, layout="row", row_length=16)
    validate(layout="row", row_length=16)
    validate(20, layout="row")
    validate(32, layout="row", row_length=16, lengths=array(np.array([7, 0, 3], np.int32)))
    validate(32, layout="row", row_length=16, lengths=[7, 0, 3])
    for arguments, message in (
        ({"layout": "row"}, "row_length: expected the tokens of a packed row over all ranks, got None"),
        ({"total": 18, "layout": "row"}, "total: expected packed rows of a multiple of 2 . world_size = 4 tokens"),
        ({"total": 16, "layout": "row"}, "cu_seqlens: expected to end at or before the 16 rows there are, got 20"),
        ({"total": 20, "layout": "row", "lengths": [7, 10, 0]}, "lengths: expected .* 9 .* got 10 .sequence 1."),
        ({"total": 20, "layout": "row", "lengths": [7, -1, 0]}, "lengths: expected .* got -1 .sequence 1."),
        ({"total": 20, "layout": "row", "lengths": [7, 1]}, r"lengths: expected shape \[N\] = \(3,\)"),
        ({"total": 20, "layout": "row", "lengths": np.ones(3, np.float32)}, "lengths: expected dtype int32"),
        ({"total": 48, "layout": "row", "row_length": 16}, "cu_seqlens: expected to end in the last row of 16 tokens"),
        ({"total": 24, "layout": "row", "row_length": 12}, "cu_seqlens: expected documents within a row of 12 tokens"),
        ({}, "cu_seqlens: expected lengths that are multiples of 2"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            validate(**arguments)
    module.validate(array(np.array([0, 8, 12], np.int32)), 2, 16, lengths=[5, 4])
    with pytest.raises(ValueError, match=r"^lengths: expected real lengths from 0 to the 8 rows"):
        module.validate(array(np.array([0, 8, 12], np.int32)), 2, 16, lengths=[9, 4])


def test_frameworks_deal_out_the_same():
    packing = random_packing(np.random.default_rng(5), 4)
    x = make_inputs(Case(name="rows", world_size=1, lengths=(packing.total,)))["q"]
    form = {"layout": "row", "row_length": packing.row_length}
    for rank in range(4):
        ours = zigzag_torch.shard(torch.tensor(x), packing.cu_seqlens, rank, 4, **form).numpy()
        np.testing.assert_array_equal(ours, np.asarray(zigzag_jax.shard(x, packing.cu_seqlens, rank, 4, **form)))
