"""Which keys and rows the kernels for Hopper bring, in which order, and what they hide: their own code, on NumPy."""

import collections
import itertools
import types

import numpy as np
import pytest

from tests.support.device_code import in_numpy, struct_in_numpy


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
    next_block = in_numpy(key_stream.next_block)
    rng = np.random.default_rng(slots)
    for _ in range(100):
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
                brought = next_block(walk, brought, i + 1, count, 2)
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
        geometry=types.SimpleNamespace(HEADS_TOGETHER=heads), keys=keys, k="k", v="v", load=load, CHUNKS=False,
        empty=types.SimpleNamespace(wait=wait),
    )  # fmt: skip
    names = {name: in_numpy(getattr(key_stream, name)) for name in ("next_block", "_load_bounded")}
    produce = in_numpy(key_stream.produce_keys, **names)
    produce.__globals__["gl"].to_tensor = int
    produce(stream, "k", "v", 0, v_behind)
    rows = [5 + 3 * length, 5 + 2 * length, 5 + length, 5]
    expected = [(4 * head + i, head, row) for head in range(heads) for i, row in enumerate(rows)]
    assert brought == {"k": expected, "v": expected}


def test_the_producer_of_wide_heads_brings_v_then_k_of_each_block_into_stages_that_were_left():
    from zigzag_kernels.hopper import keys as key_stream
    from zigzag_kernels.hopper import wide_dq

    events, length = [], 7
    Keys = struct_in_numpy(key_stream.Keys, KeyBlock=struct_in_numpy(key_stream.KeyBlock))
    keys = Keys(seen=4 * length - 2, kv_row=5, kv_chunk=0, SLOTS=1, BLOCK_N=length)
    keys.descriptor = lambda array, *_: array
    stream = struct_in_numpy(wide_dq.ValuesAndKeys)(
        geometry=None, keys=keys, CHUNKS=False, empty=types.SimpleNamespace(wait=lambda i: events.append(i)),
        ring=types.SimpleNamespace(load=lambda array, place, i: events.append((i, array, place[1]))),
    )  # fmt: skip
    produce = in_numpy(
        wide_dq.produce_values_and_keys, V=0, K=1, next_block=in_numpy(key_stream.next_block)
    )  # fmt: skip
    produce.__globals__["gl"].to_tensor = int
    produce(stream, "v", "k", 0)
    rows = [5 + 3 * length, 5 + 2 * length, 5 + length, 5]
    blocks = [(i, array, row) for i, (row, array) in enumerate(itertools.product(rows, "vk"))]
    assert events == [event for i, block in enumerate(blocks) for event in (i, block)]


class Entry(tuple):
    """Stands for a pointer to a table."""

    def __add__(self, fields):
        return Entry(self[fields:])

    def to(self, _):
        return 0


class RowBlocks:
    """The functions of `hopper/rows.py` that say which rows stream past a tile of keys, on NumPy."""

    def __init__(self, load_document=None):
        from zigzag_kernels.hopper import order, rows
        from zigzag_kernels.segments import lookup, ranges

        found = {name: in_numpy(getattr(lookup, name)) for name in ("load_half", "key_index", "key_position")}
        found |= {"load_ranged_half": in_numpy(lookup.load_ranged_half), "load_document": load_document}
        found |= {name: in_numpy(getattr(rows, name)) for name in ("block_begin", "tokens_before")}
        found["positions_seen"] = in_numpy(ranges.positions_seen)
        found["seeing_positions"] = in_numpy(ranges.seeing_positions, **found)
        found["keys_of_positions"] = in_numpy(ranges.keys_of_positions, **found)
        for module, name in (
            (rows, "HalfBlocks"), (rows, "SequenceRows"), (order, "BlockOrder"), (order, "FirstTiles"),
        ):  # fmt: skip
            found[name] = struct_in_numpy(getattr(module, name), **found)
        self.find = found["find_half_blocks"] = in_numpy(rows.find_half_blocks, **found)
        self.find_rows = in_numpy(rows.find_sequence_rows, **found)
        self.find_start = in_numpy(order.find_start, **found)
        self.order = in_numpy(order.order_blocks, **found)
        self.find_first = in_numpy(order.find_first_tiles, **found)
        self.produce = in_numpy(rows.produce_rows, **found)
        vars(self.produce.__globals__["gl"]).update(
            arange=lambda begin, end, _: np.arange(begin, end), BlockedLayout=lambda *_: None, num_warps=lambda: 1,
            load=lambda *_, **__: 0, int64=None,
        )  # fmt: skip

    def bring(self, owned, mask, sequence, packing, start):
        """The places (row of the sequence, head) of the boxes of one head, from its last rows, as the producer does."""
        brought = []
        ignore = types.SimpleNamespace(
            load=lambda *_: None, arrive=lambda _: None, wait=lambda _: None, store=lambda _: None,
            index=lambda _: ignore, lse2_ptr=0, delta_ptr=0, q=None, dout=None, T=np.int64(0),
        )  # fmt: skip
        stream = types.SimpleNamespace(
            geometry=types.SimpleNamespace(
                GROUP=packing.HEADS * packing.PARTS, BLOCK_D=1, HEAD_DIM=1, HEADS_TOGETHER=1, WIDE=False, STAGES=2,
                STREAMED=packing.TOKENS * packing.HEADS,
            ),
            packing=packing, mask=mask, PAIRED=False, dout=ignore, empty=ignore, lse2=ignore, delta=ignore,
            limits=ignore,
            q=types.SimpleNamespace(load=lambda _, box, i: brought.append((i, *box)), arrive=lambda _: None),
        )  # fmt: skip
        rows = types.SimpleNamespace(first=sequence.first, descriptor=lambda *_: None)
        arrays = types.SimpleNamespace(q=None, dout=None, lse2_ptr=0, delta_ptr=0, T=Entry())
        self.produce(stream, owned, rows, arrays, True, start)
        assert [i for i, *_ in brought] == [*range(len(brought))]
        return [(row, head) for _, row, head, _ in brought]

    def visit(self, owned, mask, lengths):
        """Walk from the last block of each run: return (pairs, places, blocks that are clamped).

        `pairs` count for each half how often each of its rows met each key of the tile; `owned.numbers` are those that
        the masks compare.
        """
        late, early = found = [self.find(owned, n, mask) for n in range(2)]
        sequence = self.find_rows(owned, 0, mask)
        pairs, places = [np.zeros((length, len(owned.numbers)), int) for length in lengths], []
        clamped, visited = 0, []
        for kind, (n, half) in itertools.product(("whole", "before", "behind"), enumerate(found)):
            runs = {"whole": (half.masked, half.whole_end), "behind": (half.whole_end, half.blocks)}
            for block in reversed(range(*runs.get(kind, (0, half.masked)))):
                begin, end = half.tokens(block, mask)
                assert 0 <= begin < end <= lengths[n]
                clamped += begin != half.first + block * mask.TOKENS
                rows = begin + np.arange(end - begin)
                seen = half.seen_by(rows, mask)
                sees = owned.numbers < seen.end[:, None]
                if mask.RANGED:
                    sees &= owned.numbers >= seen.begin[:, None]
                if kind == "whole":
                    assert sees.all()
                    assert end - begin == mask.TOKENS
                assert half.q_row + end <= sequence.first + sequence.count
                pairs[n][rows] += sees
                places.append(half.q_row + begin - sequence.first)
                visited.append((n, block))
        start = ()
        if mask.GRID and places:
            start = tuple(int(x) for x in self.find_start(late, early, mask))
            assert visited[start[2]] == (start[0] % 2, start[1])
            places = places[start[2] :] + places[: start[2]]
        packing = types.SimpleNamespace(TOKENS=mask.TOKENS, HEADS=4, PARTS=2)
        expected = [(place, packing.HEADS * part) for place in places for part in range(packing.PARTS)]
        start = start or (0, -1, 0)
        assert self.bring(owned, mask, sequence, packing, start) == expected
        order = self.order(late, early, sequence, mask, start)
        assert [order.place(i, packing) for i in range(len(expected))] == expected
        return pairs, places, clamped


class Numbers(np.ndarray):
    """A buffer of shared memory, and what is read from it."""

    permute = np.ndarray.transpose

    def load(self, _):
        return self


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_numbers_of_rows_are_read_in_the_order_of_rows(rows):
    """Whatever the order in which the producer stores them; a thread reads four places next to each other."""
    from zigzag_kernels.hopper import row_numbers

    stored = in_numpy(row_numbers.rows_of_places)(np.arange(rows)).view(Numbers)
    language = types.SimpleNamespace(constexpr=None, SliceLayout=lambda *_: None, convert_layout=lambda x, *_, **__: x)
    assert (in_numpy(row_numbers.read_numbers, gl=language)(stored) == np.arange(rows)).all()
    # The second thread of each four holds columns 2 and 3 of each eight, in two rows of 16.
    assert stored[4:8].tolist() == [2, 3, 10, 11]


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_blocks_of_rows_bring_every_row_that_sees_a_tile_of_keys_once(causal):
    """The order of the producer of dK/dV, and where the fused kernel adds dQ: never before the first row of a half."""
    blocks = RowBlocks()
    blocks.find_rows = lambda *_: types.SimpleNamespace(first=7, count=2 * length)
    rng = np.random.default_rng(causal)
    clamped = 0
    for _ in range(100):
        tokens, tile, length = (int(rng.integers(1, limit)) for limit in (6, 9, 30))
        keys = 2 * length if rng.integers(2) else 8 * length
        ends = [(int(x), int(rng.integers(0, keys + 1))) for x in rng.integers(0, keys, 2)]
        # The late half lies behind the early one.
        entries = [(7 + (1 - n) * length, length, *end, 0) for n, end in enumerate(ends)]
        mask = types.SimpleNamespace(RANGED=False, CAUSAL=causal, TOKENS=tokens, KEYS=tile, GRID=False)
        before = None
        for first_key in range(0, keys, tile):
            owned = types.SimpleNamespace(
                halves_ptr=Entry(itertools.chain(*entries)), first_key=first_key, n_keys=keys,
                numbers=np.arange(first_key, min(first_key + tile, keys)),
            )  # fmt: skip
            pairs, places, more = blocks.visit(owned, mask, [length, length])
            clamped += more
            # Where tiles take turns at blocks, which they name by their places, the tile before has all blocks of this.
            assert len({*places}) == len(places)
            assert before is None or {*places} <= before
            before = {*places}
            for (_, _, diagonal, kv_len, _), met in zip(entries, pairs, strict=True):
                sees = np.minimum(diagonal + np.arange(length) + 1, kv_len) if causal else np.full(length, keys)
                np.testing.assert_array_equal(met, owned.numbers < sees[:, None])
    assert clamped > 50


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("gathered", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_blocks_of_rows_under_a_mask_of_ranges_are_those_of_its_area(gathered, grid):
    """Under windows, chunks and padding the producer brings only blocks with a row that sees the tile.

    On a grid a tile's turn at a block is the number of tiles before it that add to the block.
    """
    from zigzag_kernels.hopper.rows import count_longest_walk

    blocks = RowBlocks(lambda owned: owned.document)
    rng = np.random.default_rng(gathered)
    whole = brought = later = 0
    for _ in range(100):
        tokens, tile, early, late = (int(rng.integers(*limits)) for limits in ((1, 6), (1, 9), (0, 30), (0, 30)))
        between, behind = (int(x) for x in rng.integers(0, 40, 2))
        early_first = int(rng.integers(0, 20))
        late_first = early_first + early + between
        length = late_first + late + behind
        real = int(rng.integers(0, length + 1)) if rng.integers(2) else length
        left, right, chunk = (int(rng.choice(x)) for x in ((-1, 0, 3, 20), (-1, 0, 5), (0, 0, 2, 7, 25)))
        causal = bool(rng.integers(2))
        mask = types.SimpleNamespace(
            RANGED=True, CAUSAL=causal, LEFT=left, RIGHT=right, CHUNK=chunk, TOKENS=tokens, KEYS=tile, GRID=grid,
        )  # fmt: skip
        mask.WALK = walk = count_longest_walk(mask, tokens, tile) if grid else 0
        parts = [(0, length), (length, 0)] if gathered else [(early_first, early), (late_first, late)]
        (first, count), (second, _) = parts
        positions = np.concatenate([start + np.arange(number) for start, number in parts])
        document = types.SimpleNamespace(
            real=real, early_position=first, early_keys=count, late_position=second, n_keys=len(positions), place=0
        )
        # A half without tokens lies at row 0 in the row layout.
        rows_of_empty = int(rng.integers(2))
        entries = [
            ((7 + early) * (late > 0 or rows_of_empty), late, 0, 0, late_first),
            (7 * (early > 0 or rows_of_empty), early, 0, 0, early_first),
        ]
        added, before = collections.Counter(), {}
        for first_key in range(0, len(positions), tile):
            owned = types.SimpleNamespace(
                halves_ptr=Entry(itertools.chain(*entries)), first_key=first_key, n_keys=len(positions),
                numbers=positions[first_key : first_key + tile], document=document,
            )  # fmt: skip
            pairs, places, _ = blocks.visit(owned, mask, [late, early])
            expected = []
            for (_, number, _, _, start), met in zip(entries, pairs, strict=True):
                rows, keys = start + np.arange(number)[:, None], owned.numbers[None, :]
                sees = (rows < real) & (keys < real)
                if causal or right >= 0:
                    sees &= keys <= rows + (0 if causal else right)
                if left >= 0:
                    sees &= keys >= rows - left
                if chunk:
                    sees &= keys // chunk == rows // chunk
                np.testing.assert_array_equal(met, sees)
                expected.append(_count_blocks(sees.any(1), tokens, grid))
                whole += sees.all(1).any()
            # The rows of a half that see a tile follow each other, unless its keys are of two parts far apart.
            gap = not gathered and first_key < count < first_key + tile
            assert len(places) == sum(expected) or gap
            assert walk == 0 or gap or len(places) <= walk + 2
            brought += len(places)
            if grid:
                first_tiles = blocks.find_first(owned, blocks.find_rows(owned, 0, mask), mask)
                assert len({*places}) == len(places)
                # A tile visits each block later than the tile before it does, or at most a tile's blocks earlier.
                late_by = [before.get(place, 0) - i for i, place in enumerate(places)]
                assert not gathered or walk > 0 or max(late_by, default=0) <= tile // tokens + 1
                before = {place: i for i, place in enumerate(places)}
                for place in places:
                    turn = first_key // tile - first_tiles.of(place)
                    assert turn == added[place]
                    added[place] += 1
                    later += turn < first_key // tile
    assert min(whole, brought) > 500
    assert later > 500 or not grid


def _count_blocks(seeing, tokens, grid):
    """Blocks of `tokens` rows that hold the rows `seeing`, counted from the first of them or on a grid."""
    rows = np.flatnonzero(seeing)
    if grid:
        return len({*(rows // tokens)})
    return -(-len(rows) // tokens)
