"""`cu_seqlens` and real lengths out of segment ids and position ids, in both frameworks, against plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import zigzag_jax
import zigzag_torch

PACKAGES = {"torch": (zigzag_torch, torch.tensor), "jax": (zigzag_jax, jnp.asarray)}


@pytest.fixture(params=PACKAGES)
def package(request):
    """(module, a function that makes its arrays)."""
    return PACKAGES[request.param]


def traced(module, function):
    """`function` where values are not at hand: under `jax.jit`, or under `vmap` of one batch."""
    if module is zigzag_jax:
        return jax.jit(function)
    return lambda *arrays: torch.vmap(function)(*(x[None] for x in arrays))[0]


def lists(results):
    return [np.asarray(x).tolist() for x in (results if isinstance(results, tuple) else (results,))]


IDS = {
    "padding behind": ([1, 1, 1, 2, 3, 3, 0, 0], [0, 3, 4, 6, 6, 6], [3, 1, 2, 0, 0]),
    "ids that return": ([7, 7, 2, 2, 2, 7, 7, 7], [0, 2, 5, 8, 8, 8], [2, 3, 3, 0, 0]),
    "padding between": ([0, 0, 1, 1, 0, 2, 2, 0], [0, 2, 4, 5, 7, 7], [0, 2, 0, 2, 0]),
    "padding alone": ([0] * 8, [0] * 6, [0] * 5),
    "nothing": ([], [0] * 6, [0] * 5),
    "as many as there may be": ([1, 2, 3, 4, 5, 5, 0, 0], [0, 1, 2, 3, 4, 6], [1, 1, 1, 1, 2]),
    "one too many": ([1, 2, 3, 4, 5, 6, 0, 0], [0, 1, 2, 3, 4, -1], [0] * 5),
    "rows": ([[1, 1, 1, 1], [1, 1, 2, 2]], [0, 4, 6, 8, 8, 8], [4, 2, 2, 0, 0]),
    "rows with padding": ([[1, 1, 2, 0], [0, 2, 2, 0]], [0, 2, 3, 4, 5, 7], [2, 1, 0, 0, 2]),
}


@pytest.mark.parametrize("name", IDS)
def test_segment_ids(package, name):
    module, array = package
    ids, offsets, lengths = IDS[name]
    ids = array(np.array(ids, np.int32))
    convert = functools.partial(module.cu_seqlens_from_segment_ids, max_sequences=5)
    assert lists(convert(ids)) == lists(traced(module, convert)(ids)) == [offsets]
    assert lists(convert(ids, return_lengths=True)) == [offsets, lengths]
    assert all(np.asarray(x).dtype == np.int32 for x in convert(ids, return_lengths=True))


@pytest.mark.parametrize("max_sequences", [2, 4, 5])
def test_rows_of_padding_alone(package, max_sequences):
    """With real lengths the offsets reach into the last row, as attention to packed rows wants them."""
    module, array = package
    ids = array(np.array([[3, 3, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.int32))
    assert lists(module.cu_seqlens_from_segment_ids(ids, 4)) == [[0, 3, 3, 3, 3]]
    cu_seqlens, lengths = module.cu_seqlens_from_segment_ids(ids, max_sequences, return_lengths=True)
    if max_sequences == 2:
        assert np.asarray(cu_seqlens)[-1] == -1
        return
    assert lists((cu_seqlens, lengths)) == [
        [0, 3, 4, *[8] * (max_sequences - 2)],
        [3, *[0] * (max_sequences - 1)],
    ]
    module.validate(cu_seqlens, 2, 12, layout="row", row_length=4, lengths=lengths)


def test_positions_part_neighbours_with_the_same_id(package):
    module, array = package
    ids = array(np.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 2, 2]], np.int32))
    positions = array(
        np.array([[0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]], np.int64 if module is zigzag_torch else np.int32)
    )
    results = module.cu_seqlens_from_segment_ids(ids, 8, positions, return_lengths=True)
    assert lists(results) == [[0, 2, 3, 5, 6, 8, 10, 12, 12], [2, 1, 2, 0, 2, 0, 2, 0]]


POSITIONS = {
    "one": ([0, 1, 2, 3], [0, 4, 4, 4, 4]),
    "three": ([0, 1, 0, 0, 1, 2], [0, 2, 3, 6, 6]),
    "rows": ([[0, 1, 2], [0, 1, 0]], [0, 3, 5, 6, 6]),
    "a row that goes on": ([[0, 1, 2], [3, 4, 0]], [0, 3, 5, 6, 6]),
    "nothing": ([], [0, 0, 0, 0, 0]),
    "as many as there may be": ([0, 0, 0, 0], [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_position_ids(package, name):
    module, array = package
    positions, offsets = POSITIONS[name]
    positions = array(np.array(positions, np.int32))
    convert = functools.partial(module.cu_seqlens_from_position_ids, max_sequences=4)
    assert lists(convert(positions)) == lists(traced(module, convert)(positions)) == [offsets]
    assert np.asarray(convert(positions)).dtype == np.int32


@pytest.mark.parametrize("positions", [[0, 1, 6, 7], [0, 0, 1, 1], [0, -1, 0, 1], [-1, 0, 1, 2], [0, 0, 0, 0, 0]])
def test_positions_that_none_can_have_are_refused_later(package, positions):
    """Those of a rank's zigzag rows, of left padding, negative ones, and of more documents than there may be."""
    module, array = package
    cu_seqlens = module.cu_seqlens_from_position_ids(array(np.array(positions, np.int32)), 4)
    assert np.asarray(cu_seqlens)[-1] == -1
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected no decrease"):
        module.validate(cu_seqlens, 1)


def test_positions_of_a_whole_batch_come_back(package):
    module, array = package
    cu_seqlens = array(np.array([0, 5, 6, 13, 16], np.int32))
    positions = module.position_ids(cu_seqlens, 0, 1)
    assert lists(module.cu_seqlens_from_position_ids(positions, 4)) == lists(cu_seqlens)


def random_ids(rng):
    """Segment ids of up to three rows of twelve tokens, in MaxText's form: 1, 2, ... in each row, 0 behind."""
    ids = np.zeros((int(rng.integers(1, 4)), 12), np.int32)
    for row in ids:
        ends = np.sort(rng.integers(0, 13, 3))
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            row[start:end] = number + 1
    return ids


def test_rows_of_random_ids_see_their_own_document_alone(package):
    """Two tokens have the same document and are real where MaxText's mask says so: same row, same id, not 0."""
    module, array = package
    rng = np.random.default_rng(0)
    for _ in range(20 if module is zigzag_torch else 4):
        ids = random_ids(rng)
        results = module.cu_seqlens_from_segment_ids(array(ids), 12, return_lengths=True)
        cu_seqlens, lengths = map(np.asarray, results)
        module.validate(cu_seqlens, 3, ids.size, layout="row", row_length=12, lengths=lengths)
        document = np.full(ids.size, -1)
        for number, (start, length) in enumerate(zip(cu_seqlens[:-1], lengths, strict=True)):
            document[start : start + length] = number
        row = np.repeat(np.arange(len(ids)), 12)
        flat = ids.reshape(-1)
        wanted = (row[:, None] == row) & (flat[:, None] == flat) & (flat != 0)
        np.testing.assert_array_equal((document[:, None] == document) & (document >= 0), wanted)


def test_pytorch_counts_documents_if_nobody_says():
    ids = torch.tensor([[1, 1, 2, 0], [0, 0, 5, 5]])
    offsets, lengths = zigzag_torch.cu_seqlens_from_segment_ids(ids, return_lengths=True)
    assert (offsets.tolist(), lengths.tolist()) == ([0, 2, 3, 4, 6, 8], [2, 1, 0, 0, 2])
    assert zigzag_torch.cu_seqlens_from_segment_ids(torch.zeros(4, dtype=torch.int64)).tolist() == [0]
    assert zigzag_torch.cu_seqlens_from_position_ids(torch.tensor([[0, 1, 0, 0]])).tolist() == [0, 2, 3, 4]


def test_errors_name_the_argument(package):
    module, array = package
    ids = array(np.ones(4, np.int32))
    for arguments, message in (
        ((array(np.ones((1, 2, 4), np.int32)), 2), r"segment_ids: expected integers \[total\] or .* \(1, 2, 4\) int32"),
        ((array(np.ones(4, np.float32)), 2), r"segment_ids: expected integers .* got shape \(4,\) float32"),
        ((ids, 2, ids[:3]), r"positions: expected integers \(4,\) as segment_ids, got shape \(3,\) int32"),
        ((ids, 0), "max_sequences: expected a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            module.cu_seqlens_from_segment_ids(*arguments)
    with pytest.raises(ValueError, match=r"^return_lengths: expected True or False, got 1"):
        module.cu_seqlens_from_segment_ids(ids, 2, return_lengths=1)
    with pytest.raises(ValueError, match=r"^position_ids: expected integers \[total\] or .* got shape \(\) int32"):
        module.cu_seqlens_from_position_ids(array(np.array(0, np.int32)), 2)
