"""The data path of JAX: the same rows as in PyTorch, a loss and gradients as of one device, and mistakes on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_torch
from tests.support.commands import finish, free_port, lines_of, start_program
from tests.support.machine import GPU
from tests.support.spread import mesh_of
from zigzag_jax import host, make_zigzag_attention, token_mean_loss

IGNORE, WORLD_SIZE = -100, 4


def made_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 50, length) for length in lengths]


@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=6),
    world_size=st.integers(1, 4),
    layout=st.sampled_from(["document", "row", {"split_above": 0}, {"split_tokens": 12}]),
    masked=st.booleans(),
)
@settings(max_examples=60)
def test_rows_are_those_of_pytorch(lengths, world_size, layout, masked):
    documents = made_documents(lengths)
    options = {"pad_token_id": 7, "max_documents": len(lengths) + 1, "ignore_index": -1}
    options |= {"layout": layout} if isinstance(layout, str) else layout
    options["tokens"] = 12 + 2 * (sum(lengths) + len(lengths))
    if masked:
        options["labels"] = [np.where(np.arange(len(x)) < 3, -1, x) for x in documents]
    ours = host.shard_documents(documents, world_size, **options)
    theirs = [zigzag_torch.shard_documents(documents, rank, world_size, **options) for rank in range(world_size)]
    for name in ("input_ids", "labels", "position_ids", "loss_mask", "rows", "whole_cu_seqlens"):
        wanted = np.concatenate([getattr(batch, name).numpy() for batch in theirs])
        np.testing.assert_array_equal(getattr(ours, name), wanted)
    for name in ("cu_seqlens", "lengths", "num_targets"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs[0], name).numpy())
    np.testing.assert_array_equal(ours.fingerprint, theirs[0].fingerprint.numpy().view(np.uint32))
    assert {x.dtype.name for x in jax.tree.leaves(ours)} == {"int32", "bool", "uint32"}
    assert (ours.whole_tokens, ours.tokens, ours.layout) == (
        theirs[0].whole_tokens,
        options["tokens"],
        theirs[0].layout,
    )
    ids = host.unshard_rows(ours.input_ids, ours)
    np.testing.assert_array_equal(ids, np.concatenate(documents))


def test_no_device_is_touched():
    assert lines_of("host_without_devices") == ["False"]


def made_weights():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (50, 32), "q": (32, 32), "k": (32, 16), "v": (32, 16), "logits": (32, 50)}
    return {name: rng.standard_normal(shape, np.float32) / 4 for name, shape in shapes.items()}


def logits_of(weights, batch, mesh, layout):
    attend = make_zigzag_attention(mesh, "cp", layout=layout)
    prepared = attend.prepare_batch(batch)
    x = weights["embedding"][batch.input_ids] + batch.position_ids[:, None] / 16
    q, k, v = ((x @ weights[name]).reshape(len(x), -1, 16) for name in "qkv")
    return (x + attend(q, k, v, prepared).reshape(len(x), -1)) @ weights["logits"]


@pytest.mark.parametrize("layout", ["document", "row"])
def test_loss_and_gradients_are_those_of_one_device(layout):
    documents = made_documents((13, 1, 8, 20))
    labels = [np.where(np.arange(len(x)) < 5, IGNORE, x) for x in documents]  # prompts, unevenly over the ranks
    results = []
    for world_size in (1, WORLD_SIZE):
        mesh = mesh_of(world_size)
        batch = host.shard_documents(documents, world_size, labels=labels, tokens=80 // world_size + 4, layout=layout)
        batch = jax.tree.map(
            lambda x, spec, mesh=mesh: jax.device_put(x, NamedSharding(mesh, spec)), batch, batch.specs()
        )

        @jax.jit
        def loss(weights, batch, mesh=mesh):
            return token_mean_loss(logits_of(weights, batch, mesh, layout), batch.labels, batch.num_targets)

        results.append(jax.value_and_grad(loss)(made_weights(), batch))
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_the_loss_inside_shard_map_is_that_outside():
    rng = np.random.default_rng(1)
    batch = host.shard_documents(made_documents((9, 4, 17)), WORLD_SIZE)
    x = rng.standard_normal((len(batch.labels), 16), np.float32)
    weights = rng.standard_normal((16, 50), np.float32)
    in_specs = P(), P("cp"), P("cp"), P()

    def inside(weights, x, labels, num_targets):
        return token_mean_loss(x @ weights, labels, num_targets, axis_name="cp")

    def outside(weights, x, labels, num_targets):
        return token_mean_loss(x @ weights, labels, num_targets)

    arguments = weights, x, batch.labels, batch.num_targets
    wanted = jax.value_and_grad(outside)(*arguments)
    spread = {"mesh": mesh_of(WORLD_SIZE), "in_specs": in_specs}
    for ours in (
        jax.jit(jax.shard_map(jax.value_and_grad(inside), out_specs=(P(), P()), **spread))(*arguments),
        jax.jit(jax.value_and_grad(jax.shard_map(inside, out_specs=P(), **spread)))(*arguments),
    ):
        for mine, theirs in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="labels: expected those of each rank"
    ):  # whose gradients would be W times that
        jax.shard_map(inside, out_specs=P(), check_vma=False, **spread)(*arguments)


def test_the_loss_is_the_mean_of_all_targets_or_nan():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 9), np.float32))
    labels = np.array([1, IGNORE, 3, IGNORE, 8, 0], np.int32)
    wanted = torch.nn.functional.cross_entropy(torch.tensor(np.asarray(logits)), torch.tensor(labels).long())
    np.testing.assert_allclose(token_mean_loss(logits, labels, 4), wanted, rtol=1e-6)
    assert token_mean_loss(logits, np.full(6, IGNORE, np.int32), 0) == 0
    one = np.array([IGNORE, 2, *[IGNORE] * 4], np.int32)
    np.testing.assert_allclose(token_mean_loss(logits, one, 1), -jax.nn.log_softmax(logits)[1, 2], rtol=1e-6)
    assert jnp.isnan(token_mean_loss(logits, np.where(labels == IGNORE, 0, labels), 4))  # padded with token 0
    assert jnp.isnan(token_mean_loss(logits, labels, 2))  # of one rank: a mean of means
    for unknown in (-1, 9):  # JAX would take -1 for the last number of the vocabulary
        assert jnp.isnan(token_mean_loss(logits, np.where(labels == 8, unknown, labels), 4))
    own = token_mean_loss(logits, np.where(labels == IGNORE, -1, labels), 4, ignore_index=-1)
    np.testing.assert_allclose(own, wanted, rtol=1e-6)


def test_other_tokens_of_equal_lengths_have_another_fingerprint():
    batches = [host.shard_documents([[1, 2, 3], [4, last]], 2) for last in (5, 6)]
    assert (batches[0].cu_seqlens == batches[1].cu_seqlens).all()
    assert (batches[0].fingerprint != batches[1].fingerprint).any()


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="processes of a CPU")
@pytest.mark.parametrize(("how", "code"), [("same", 0), ("other", 1)])
def test_processes_that_hold_other_tokens_are_found_out(how, code):
    port = str(free_port())
    results = finish(*(start_program("jax_data_rank", str(process), port, how) for process in range(2)))
    assert [result.code for result in results] == [code, code], results
    if how == "other":
        assert all("is not the same on each process" in result.errors for result in results)
    else:
        assert [result.lines for result in results] == [["101"], ["101"]]


def test_batches_of_a_size_compile_once():
    traces = []

    @jax.jit
    def step(batch):
        traces.append(batch)
        return batch.input_ids.sum()

    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 12, 3 + seed)
        step(host.shard_documents(made_documents(lengths, seed), 2, tokens=60, max_documents=8, split_tokens=24))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [[2, 3, 4, IGNORE], [6, 7, 9]]}, "labels: expected the label of every token in its own place"),
        ({"labels": [[1, 2, 3, 4]]}, "labels: expected those of 2 documents, got 1"),
        ({"labels": [[1, 2, 3, 4], [1, 2]]}, r"labels: expected one for each of 3 tokens, got 2 \(document 1\)"),
        ({"documents": [[1.5]]}, r"documents: expected integers \[n\], got shape \(1,\) float64 \(document 0\)"),
        ({"documents": [[2**31]]}, "documents: expected integers that int32 holds, got 2147483648 to 2147483648"),
        ({"documents": [[1, [2]]]}, r"documents: expected integers \[n\], got list \(document 0\)"),
        ({"documents": "text"}, "documents: expected a list of documents, got str"),
        ({"tokens": 3, "split_above": 0}, "got 3 rows a rank, 1 tokens too many"),
        ({"split_above": 2, "layout": "row"}, "split_above: expected None with layout 'row', got 2"),
        ({"max_documents": 1}, "max_documents: expected at least the 2 documents of the batch, got 1"),
        ({"ignore_index": 2**40}, "ignore_index: expected an integer that int32 holds, got 1099511627776"),
        ({"layout": "rows"}, "layout: expected 'document' or 'row', got 'rows'"),
    ],
)
def test_errors_of_documents(arguments, message):
    with pytest.raises(ValueError, match=message):
        host.shard_documents(**{"documents": [[1, 2, 3, 4], [5, 6, 7]], "world_size": 2} | arguments)


def test_rows_of_another_batch_are_not_put_in_order():
    batch = host.shard_documents([[1, 2, 3, 4], [5, 6, 7]], 2)
    with pytest.raises(ValueError, match=r"x: expected \[W \* T, ...\] with the 8 rows of the batch"):
        host.unshard_rows(batch.input_ids[:4], batch)
    for mesh, options, message in (
        (mesh_of(2), {"layout": "row"}, "layout: expected that of the batch, 'document', got 'row'"),
        (mesh_of(4), {}, "world_size: expected that of the batch, 2, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make_zigzag_attention(mesh, **options).prepare_batch(batch)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 24), max_size=12), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_packed_rows_hold_whole_documents(lengths, rows, world_size, masked):
    """In the order of the tokens each document is in one place, its labels are its next tokens, and ids count up."""
    documents = [1000 * i + np.arange(length) for i, length in enumerate(lengths, 1)]
    targets = [np.where(x % 3 == 0, IGNORE, x) if masked else x for x in documents]
    row_length = 2 * world_size * -(-(sum(lengths) // rows + 24) // (2 * world_size))  # always enough
    labels = {"labels": targets} if masked else {}
    packed = host.pack_rows(documents, rows, row_length, world_size, pad_token_id=7, **labels)
    in_order = [host.reorder_rows(x, world_size, to_contiguous=True) for x in packed[:4]]
    found = []
    for ids, labels, positions, segments in zip(*in_order, strict=True):
        real = segments != 0
        assert not real[np.argmin(real) :].any() or real.all()
        np.testing.assert_array_equal(ids[~real], 7)
        np.testing.assert_array_equal(labels[~real], -100)
        for number in range(1, segments.max(initial=0) + 1):
            of_number = segments == number
            document = ids[of_number]
            found.append(document.tolist())
            following = [*document[1:], IGNORE] if len(document) else []
            following = [IGNORE if masked and x % 3 == 0 else x for x in following]
            np.testing.assert_array_equal(labels[of_number], following)
            np.testing.assert_array_equal(positions[of_number], np.arange(len(document)))
    assert sorted(x for x in found if x) == sorted(x.tolist() for x in documents if len(x))
    assert packed.num_targets == (packed.labels != -100).sum()


def test_rows_that_documents_do_not_fit_are_refused():
    documents = [np.arange(9), np.arange(9), np.arange(4)]
    with pytest.raises(
        ValueError, match=r"documents: expected 22 tokens that fit .* got 4 where .* room for 3 \(document 0\)"
    ):
        host.pack_rows(documents[::-1], 2, 12)
    with pytest.raises(ValueError, match=r"row_length: expected a multiple of 2 \* world_size = 4, .* got 14"):
        host.pack_rows(documents, 2, 14, 2)
    a, b = (host.pack_rows([x], 1, 12).fingerprint for x in (np.arange(4), np.arange(4)[::-1]))
    assert (a != b).any()
