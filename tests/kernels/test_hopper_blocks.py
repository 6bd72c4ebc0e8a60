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


class Scores(np.ndarray):
    """An array with what a tile says of its layout."""

    type = types.SimpleNamespace(layout=None)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_blocks_bring_every_key_once_and_hide_what_is_not_seen(slots):
    """The walk of the producer and the masks of the consumers, on a buffer that says which key each row holds."""
    from zigzag_kernels.hopper import pipeline
    from zigzag_kernels.segments.lookup import chunk_row

    block_place = in_numpy(pipeline.block_place, chunk_row=in_numpy(chunk_row))
    steps = {name: in_numpy(getattr(pipeline, name)) for name in ("top_block", "walk_down")}
    top_block = steps["top_block"]
    next_place = in_numpy(pipeline.next_place, block_place=block_place, **steps)
    blocks_to_hide, hide = in_numpy(pipeline.blocks_to_hide), in_numpy(pipeline.hide)
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
        chunk, start, blocks = top_block(seen, chunk_length, slots, block)
        masked, ragged = blocks_to_hide(blocks, int(limits[0]), chunk_length, slots, block)
        visits, head = np.zeros((8, keys), int), 0
        first = slot, row = block_place(chunk, start, kv_row, chunk_length, slots)
        for i in range(blocks):
            scores = np.broadcast_to(held[slot, row : row + block], (8, block)).view(Scores)
            columns = types.SimpleNamespace(load=lambda _, block=block: np.arange(block))
            place = i, blocks, masked, ragged, chunk_length, slots, block
            shown, ragged = hide(scores, -1, columns, limits, *place)
            for visit, keys_shown in zip(visits, shown, strict=True):
                np.add.at(visit, keys_shown[keys_shown >= 0], 1)
            assert (shown != -2).all()
            chunk, start, head, slot, row = next_place(
                i + 1, blocks, chunk, start, head, seen, kv_row, chunk_length, slots, block, 2
            )
            assert head == (i + 1) // blocks
        assert (slot, row) == first  # of the next head
        np.testing.assert_array_equal(visits, np.arange(keys) < limits[:, None])


class Entry(tuple):
    """Stands for a pointer to a table."""

    def __add__(self, fields):
        return Entry(self[fields:])


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_rows_bring_every_row_that_sees_a_tile_of_keys_once(causal):
    """The order of the producer of dK/dV, and where the fused kernel adds dQ: never before the first row of a half."""
    from zigzag_kernels.hopper import dkdv, fused
    from zigzag_kernels.segments.lookup import load_half

    half, block_tokens = in_numpy(dkdv._half, load_half=in_numpy(load_half)), in_numpy(dkdv._block_tokens)
    block_place = in_numpy(fused._block_place, _block_tokens=block_tokens)
    rng = np.random.default_rng(causal)
    clamped = 0
    for _ in range(200):
        tokens, tile, length = (int(rng.integers(1, limit)) for limit in (6, 9, 30))
        keys = 2 * length if rng.integers(2) else 8 * length
        first_row, ends = 7, [(int(x), int(rng.integers(0, keys + 1))) for x in rng.integers(0, keys, 2)]
        # The late half lies behind the early one.
        entries = [(first_row + (1 - n) * length, length, *end) for n, end in enumerate(ends)]
        halves = Entry(itertools.chain(*entries))
        for first_key in range(0, keys, tile):
            tile_keys = np.arange(first_key, min(first_key + tile, keys))
            found = [half(halves, n, first_key, keys, causal, tile, tokens) for n in range(2)]
            pairs = np.zeros((2, length, len(tile_keys)), int)  # how often each row met each key
            places = []
            for run in range(4):
                q_row, diagonal, kv_len, first, blocks, masked = found[run % 2]
                for block in range(masked if run < 2 else 0, blocks if run < 2 else masked):
                    begin, end = block_tokens(first, block, tokens)
                    assert 0 <= begin < end <= length
                    clamped += begin != first + block * tokens
                    rows = begin + np.arange(tokens)
                    limit = np.where(rows < end, np.minimum(diagonal + rows + 1, kv_len), 0)
                    if run < 2:
                        assert (limit > tile_keys[-1]).all()
                    hidden = rows >= end
                    pairs[run % 2, rows[~hidden]] += tile_keys < limit[~hidden, None]
                    places.append(q_row + begin - first_row)
            (late_row, _, _, late_first, *late), (_, _, _, early_first, *early) = found
            late, early = ((blocks - masked, masked) for blocks, masked in (late, early))
            for number, place in enumerate(places):
                for part in range(3):
                    assert block_place(
                        3 * number + part, late_row - first_row, late_first, *late, early_first, *early, tokens, 3, 4
                    ) == (place, 4 * part)
            for (_, _, diagonal, kv_len), met in zip(entries, pairs, strict=True):
                sees = np.minimum(diagonal + np.arange(length) + 1, kv_len) if causal else np.full(length, keys)
                np.testing.assert_array_equal(met, tile_keys < sees[:, None])
    assert clamped > 100
