"""Which keys and rows the kernels for Hopper bring, in which order, and what they hide: their own code, on NumPy."""

import itertools
import types

import numpy as np
import pytest


def in_numpy(function, **others):
    """A device function as a plain one on NumPy arrays."""
    language = types.SimpleNamespace(
        maximum=np.maximum, minimum=np.minimum, where=np.where, load=lambda entry: entry[0], SliceLayout=lambda *_: None
    )
    names = function.fn.__globals__ | {"gl": language, "tl": language} | others
    return types.FunctionType(function.fn.__code__, names)


def struct_in_numpy(struct, **others):
    """A struct of the kernels as a plain class, made with the same fields by name, whose methods run on NumPy."""
    methods = {name: in_numpy(method, **others) for name, method in vars(struct).items() if hasattr(method, "fn")}
    return type(struct.__name__, (types.SimpleNamespace,), methods)


class Scores(np.ndarray):
    """An array with what a tile says of its layout."""

    type = types.SimpleNamespace(layout=None)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_blocks_bring_every_key_once_and_hide_what_is_not_seen(slots):
    """The walk of the producer and the masks of the consumers, on a buffer that says which key each row holds."""
    from zigzag_kernels.hopper import keys as key_stream
    from zigzag_kernels.hopper import masks
    from zigzag_kernels.segments.lookup import chunk_row

    names = {"chunk_row": in_numpy(chunk_row), "KeyBlock": struct_in_numpy(key_stream.KeyBlock)}
    Keys = struct_in_numpy(key_stream.Keys, **names)
    blocks_to_hide = in_numpy(masks.blocks_to_hide)
    number_blocks = in_numpy(masks.number_blocks, HeadBlocks=struct_in_numpy(masks.HeadBlocks))
    rng = np.random.default_rng(slots)
    for _ in range(200):
        block, kv_row, chunk_length = (int(rng.integers(*x)) for x in ((1, 9), (0, 5), (1, 30)))
        keys = 2 * slots * chunk_length if slots > 1 else chunk_length
        limits = np.sort(rng.integers(0, keys, 8)) + 1 if rng.integers(2) else np.full(8, keys)
        seen = int(limits[-1])
        # Each slot has its early chunk, then its late one; the box reads zeros behind them.
        end = kv_row + (2 * chunk_length if slots > 1 else seen)
        held = np.full((slots, end + block), -2)
        for key in range(keys if slots > 1 else seen):
            chunk, inner = divmod(key, chunk_length) if slots > 1 else (0, key)
            slot = min(chunk, 2 * slots - 1 - chunk) if slots > 1 else 0
            held[slot, kv_row + inner + (chunk_length if slots > 1 and chunk >= slots else 0)] = key
        walk = Keys(seen=seen, kv_row=kv_row, kv_chunk=chunk_length, SLOTS=slots, BLOCK_N=block)
        chunk, start, count = walk.top()
        assert walk.count_blocks() == count
        numbers = types.SimpleNamespace(load=lambda _, block=block: np.arange(block))
        stream = types.SimpleNamespace(keys=walk, numbers=numbers)
        hidden = blocks_to_hide(walk, count, int(limits[0]))
        brought = walk.locate(chunk, start, 0)
        for head in range(2):
            blocks = number_blocks(stream, head, count, *hidden, limits)
            ragged, visits = blocks.ragged, np.zeros((8, keys), int)
            for i in range(blocks.begin, blocks.end):
                assert brought.head == head
                scores = np.broadcast_to(held[brought.slot, brought.row : brought.row + block], (8, block)).view(Scores)
                shown, ragged = blocks.hide(scores, -1, i, ragged)
                for visit, keys_shown in zip(visits, shown, strict=True):
                    np.add.at(visit, keys_shown[keys_shown >= 0], 1)
                assert (shown != -2).all()
                brought = walk.next(brought, i + 1, count, 2)
            np.testing.assert_array_equal(visits, np.arange(keys) < limits[:, None])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("v_behind", [True, False])
def test_the_producer_of_keys_brings_no_block_before_its_stage_is_left(v_behind, heads):
    """A consumer that leaves block `i` has read K of it, and V of it or, with `v_behind`, of the one before."""
    from zigzag_kernels.hopper import keys as key_stream

    STAGES, length = 3, 7
    left, brought = {"k": -1, "v": -1}, {"k": [], "v": []}

    def wait(i):
        left.update(k=i - STAGES, v=i - STAGES - v_behind)

    def load(ring, descriptor, block, i):
        assert descriptor == f"descriptor of {ring}"
        assert i < STAGES or left[ring] >= i - STAGES
        brought[ring].append((i, block.head, block.row))

    Keys = struct_in_numpy(key_stream.Keys, KeyBlock=struct_in_numpy(key_stream.KeyBlock))
    keys = Keys(seen=4 * length - 2, kv_row=5, kv_chunk=0, SLOTS=1, BLOCK_N=length)
    keys.descriptor = lambda array, *_: f"descriptor of {array}"
    stream = types.SimpleNamespace(
        geometry=types.SimpleNamespace(HEADS_TOGETHER=heads), keys=keys, k="k", v="v", load=load,
        empty=types.SimpleNamespace(wait=wait),
    )  # fmt: skip
    produce = in_numpy(key_stream.produce_keys)
    produce.__globals__["gl"].to_tensor = int
    produce(stream, "k", "v", 0, v_behind)
    rows = [5 + 3 * length, 5 + 2 * length, 5 + length, 5]
    expected = [(4 * head + i, head, row) for head in range(heads) for i, row in enumerate(rows)]
    assert brought == {"k": expected, "v": expected}


class Entry(tuple):
    """Stands for a pointer to a table."""

    def __add__(self, fields):
        return Entry(self[fields:])


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_rows_bring_every_row_that_sees_a_tile_of_keys_once(causal):
    """The order of the producer of dK/dV, and where the fused kernel adds dQ: never before the first row of a half."""
    from zigzag_kernels.hopper import rows as row_stream
    from zigzag_kernels.segments.lookup import load_half

    HalfBlocks, block_tokens = struct_in_numpy(row_stream.HalfBlocks), in_numpy(row_stream.block_tokens)
    find = in_numpy(row_stream.find_half_blocks, load_half=in_numpy(load_half), HalfBlocks=HalfBlocks)
    BlockOrder = struct_in_numpy(row_stream.BlockOrder, block_tokens=block_tokens)
    packing = types.SimpleNamespace(TOKENS=0, HEADS=4, PARTS=3)
    rng = np.random.default_rng(causal)
    clamped = 0
    for _ in range(200):
        tokens, tile, length = (int(rng.integers(1, limit)) for limit in (6, 9, 30))
        keys = 2 * length if rng.integers(2) else 8 * length
        first_row, ends = 7, [(int(x), int(rng.integers(0, keys + 1))) for x in rng.integers(0, keys, 2)]
        # The late half lies behind the early one.
        entries = [(first_row + (1 - n) * length, length, *end) for n, end in enumerate(ends)]
        halves = Entry(itertools.chain(*entries))
        packing.TOKENS = tokens
        for first_key in range(0, keys, tile):
            tile_keys = np.arange(first_key, min(first_key + tile, keys))
            owned = types.SimpleNamespace(halves_ptr=halves, first_key=first_key, n_keys=keys)
            late, early = found = [find(owned, n, causal, tile, tokens) for n in range(2)]
            pairs = np.zeros((2, length, len(tile_keys)), int)  # how often each row met each key
            places = []
            for run in range(4):
                half = found[run % 2]
                for block in reversed(range(half.masked if run < 2 else 0, half.blocks if run < 2 else half.masked)):
                    begin, end = block_tokens(half.first, block, tokens)
                    assert 0 <= begin < end <= length
                    clamped += begin != half.first + block * tokens
                    rows = begin + np.arange(tokens)
                    limit = np.where(rows < end, np.minimum(half.diagonal + rows + 1, half.kv_len), 0)
                    if run < 2:
                        assert (limit > tile_keys[-1]).all()
                    hidden = rows >= end
                    pairs[run % 2, rows[~hidden]] += tile_keys < limit[~hidden, None]
                    places.append(half.q_row + begin - first_row)
            order = BlockOrder(
                late_row=late.q_row - first_row, late_first=late.first, late_whole=late.blocks - late.masked,
                late_masked=late.masked, early_first=early.first, early_whole=early.blocks - early.masked,
                early_masked=early.masked,
            )  # fmt: skip
            for number, place in enumerate(places):
                for part in range(packing.PARTS):
                    assert order.place(packing.PARTS * number + part, packing) == (place, packing.HEADS * part)
            for (_, _, diagonal, kv_len), met in zip(entries, pairs, strict=True):
                sees = np.minimum(diagonal + np.arange(length) + 1, kv_len) if causal else np.full(length, keys)
                np.testing.assert_array_equal(met, tile_keys < sees[:, None])
    assert clamped > 100
