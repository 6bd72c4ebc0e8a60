"""Which keys the kernels for Hopper bring where masks are ranges, and what they hide: their own code, on NumPy."""

import types

import numpy as np
import pytest

from tests.kernels.test_hopper_blocks import Scores
from tests.support.device_code import in_numpy, struct_in_numpy
from zigzag_kernels.segments.ranges import Mask

NOTHING, FOREIGN = -1, -2  # in a box: zeros behind its bound; another document, or padding, which may be NaN
HEADS = 2  # of a program


class Number(int):
    """An argument of a kernel."""

    def to(self, _):
        return int(self)


class Names:
    """The functions of `hopper/keys.py` and `hopper/masks.py` for ranges of keys, on NumPy."""

    def __init__(self):
        from zigzag_kernels.hopper import keys, masks, owned, wide_dq
        from zigzag_kernels.segments import lookup, ranges

        names = {name: in_numpy(getattr(lookup, name)) for name in ("key_index", "chunk_row")}
        names["positions_seen"] = in_numpy(ranges.positions_seen)
        names["keys_of_positions"] = in_numpy(ranges.keys_of_positions, **names)
        names |= {name: in_numpy(getattr(keys, name)) for name in ("next_block", "_load_bounded")}
        names["box_shape"] = lambda *_: None
        describe = types.SimpleNamespace(make_tensor_descriptor=lambda *described: described)
        names["hopper"] = types.SimpleNamespace(tma=describe)
        for module, struct in (
            (keys, "KeyBlock"), (keys, "RangedKeys"), (keys, "KeyStream"), (masks, "RangedHeadBlocks"),
            (masks, "RangedRowMask"), (owned, "QueryRows"), (wide_dq, "ValuesAndKeys"),
        ):  # fmt: skip
            names[struct] = struct_in_numpy(getattr(module, struct), **names)
            for method in vars(names[struct]).values():
                if isinstance(method, types.FunctionType):
                    language = method.__globals__["gl"]
                    language.arange, language.int64 = (lambda begin, end, _: np.arange(begin, end)), None
                    language.NVMMASharedLayout = types.SimpleNamespace(get_default_for=lambda *_: None)
        self.find_key_range = in_numpy(keys.find_key_range, **names)
        self.mask_rows = in_numpy(masks.mask_rows, **names)
        self.produce = in_numpy(keys.produce_keys, **names)
        self.produce_wide = in_numpy(wide_dq.produce_values_and_keys, V=0, K=1, **names)
        for produce in (self.produce, self.produce_wide):
            produce.__globals__["gl"].to_tensor = int
        self.structs = types.SimpleNamespace(**names)


class Memory:
    """A K/V buffer that says which position of a document each row holds, and the boxes that were brought of it."""

    def __init__(self, held, block):
        self.held, self.block, self.boxes = held, block, {}

    def load(self, descriptor, place, i):
        start, (*shape, _), (*strides, _), *_ = descriptor
        *outer, row, _ = place
        rows = row + np.arange(self.block)
        places = start + sum(x * stride for x, stride in zip(outer, strides, strict=False)) + rows * strides[-1]
        assert row >= 0
        assert all(0 <= x < size for x, size in zip(outer, shape, strict=False))
        box = np.full(self.block, NOTHING)
        inside = rows < shape[-1]
        box[inside] = self.held[places[inside]]
        assert i == len(self.boxes)
        self.boxes[i] = box


def place_document(rng, slots):
    """Draw a `Document`, and the memory that holds it: (document, kv_row, kv_chunk, slot_rows, memory)."""
    if slots == 1:
        early, between, late, kv_row = (int(rng.integers(0, x)) for x in (400, 200, 400, 50))
        first = int(rng.integers(0, 100))
        positions = np.concatenate([first + np.arange(early), first + early + between + np.arange(late)])
        length = first + early + between + late + int(rng.integers(0, 50))
        held = np.full(kv_row + len(positions) + 300, FOREIGN)
        held[kv_row : kv_row + len(positions)] = positions
        parts, place, kv_chunk, slot_rows = (first, early, first + early + between), 0, 0, len(held)
    else:
        kv_chunk, kv_row = int(rng.integers(1, 300)), int(rng.integers(0, 50))
        total = 2 * slots * kv_chunk
        place = int(rng.integers(0, total)) if rng.integers(2) else 0
        length = int(rng.integers(0, total - place + 1)) if rng.integers(2) else total - place
        slot_rows = kv_row + 2 * kv_chunk + int(rng.integers(0, 50))
        held = np.full(slots * slot_rows + 300, FOREIGN)
        for position in range(length):
            chunk, inner = divmod(place + position, kv_chunk)
            slot = min(chunk, 2 * slots - 1 - chunk)
            held[slot * slot_rows + kv_row + inner + (kv_chunk if chunk >= slots else 0)] = position
        parts = (0, length, length)
    real = int(rng.integers(0, length + 1)) if rng.integers(2) else length
    held[held >= real] = FOREIGN
    document = types.SimpleNamespace(
        real=real, early_position=parts[0], early_keys=parts[1], late_position=parts[2], place=place,
        n_keys=len(positions) if slots == 1 else length,
    )  # fmt: skip
    return document, length, kv_row, kv_chunk, slot_rows, held


def seen_by(rows, keys, real, mask):
    """Whether each row sees each key, by their positions."""
    rows, keys = rows[:, None], keys[None, :]
    sees = (rows < real) & (keys >= 0) & (keys < real)
    if mask.CAUSAL or mask.RIGHT >= 0:
        sees &= keys <= rows + (0 if mask.CAUSAL else mask.RIGHT)
    if mask.LEFT >= 0:
        sees &= keys >= rows - mask.LEFT
    if mask.CHUNK:
        sees &= keys // mask.CHUNK == rows // mask.CHUNK
    return sees


@pytest.mark.parametrize("kernel", ["forward", "dq", "wide dq"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_blocks_of_keys_under_a_mask_of_ranges_are_those_of_its_area(slots, kernel):
    """Each row meets each key that it sees once, and what it multiplies by probabilities never holds padding."""
    names = Names()
    rng = np.random.default_rng(slots)
    wide, v_behind = kernel == "wide dq", kernel == "forward"
    heads = 1 if wide else HEADS
    whole = masked = 0
    for _ in range(80):
        document, length, kv_row, kv_chunk, slot_rows, held = place_document(rng, slots)
        left, right, chunk = (int(rng.choice(x)) for x in ((-1, 0, 3, 70, 200), (-1, 0, 40), (0, 0, 0, 90)))
        mask = Mask(bool(rng.integers(2)), left, right, chunk)
        group, block = int(rng.integers(1, 5)), int(rng.choice([16, 64, 128]))
        geometry = types.SimpleNamespace(
            GROUP=group, OWNED=128, SLOTS=slots, HEADS_TOGETHER=heads, HEAD_DIM=1, BLOCK_D=1, dtype=None,
            SCORES=None,
        )  # fmt: skip
        first = int(rng.integers(0, length + 1))
        q_len = int(rng.integers(0, length - first + 1))
        position = types.SimpleNamespace(first=first, document=document)
        for row in range(0, q_len * group, geometry.OWNED):
            tile = types.SimpleNamespace(row=row, q_len=q_len)
            begin, seen = names.find_key_range(tile, position, geometry, mask)
            keys = names.structs.RangedKeys(
                begin=begin, seen=seen, real=int(np.sum(held >= 0)), kv_row=Number(kv_row),
                kv_chunk=Number(max(kv_chunk, 1)), place=document.place, SLOTS=slots, BLOCK_N=block,
            )  # fmt: skip
            k, v = Memory(held, block), Memory(held, block)
            of_both = {
                "geometry": geometry, "keys": keys, "CHUNKS": slots > 1,
                "numbers": types.SimpleNamespace(load=lambda _, block=block: np.arange(block)),
                "empty": types.SimpleNamespace(wait=lambda i: None),
            }  # fmt: skip
            array = types.SimpleNamespace(ptr=0, STRIDE_T=1)
            if wide:
                stream = names.structs.ValuesAndKeys(ring=Memory(held, block), **of_both)
                names.produce_wide(stream, array, array, Number(slot_rows))
                v.boxes, k.boxes = (
                    {i // 2: box for i, box in stream.ring.boxes.items() if i % 2 == n} for n in range(2)
                )
            else:
                stream = names.structs.KeyStream(k=k, v=v, **of_both)
                names.produce(stream, array, array, Number(slot_rows), v_behind)
            count = keys.count_blocks()
            assert len(k.boxes) == len(v.boxes) == heads * count
            multiplied = (v if v_behind else k).boxes.values()
            assert all((box != FOREIGN).all() for box in multiplied)
            for n in range(geometry.OWNED // 64):
                own = names.structs.QueryRows(
                    geometry=geometry, first=row + 64 * n, end=q_len * group, position=position, MASK=mask
                )
                rows = first + own.numbers(None) // group
                inside = (own.numbers(None) < own.end) & (rows < document.real)
                row_mask = names.mask_rows(own, None)
                expected = seen_by(rows, np.arange(length), document.real, mask) & np.isin(np.arange(length), held)
                blind = ~expected.any(1)
                real_rows = own.numbers(None) < own.end
                np.testing.assert_array_equal((row_mask.first >= row_mask.limit)[real_rows], blind[real_rows])
                counted = row_mask.count(keys, count)
                for head in range(heads):
                    blocks = row_mask.number(stream, head, count, counted)
                    ragged, visits = blocks.ragged, np.zeros((64, length), int)
                    for i in range(blocks.begin, blocks.end):
                        box = np.broadcast_to(k.boxes[i], (64, block)).view(Scores)
                        shown, ragged = blocks.hide(box, -3, i, ragged)
                        is_whole = shown is box
                        whole, masked = whole + is_whole, masked + (not is_whole)
                        assert not np.isin(shown, (NOTHING, FOREIGN))[inside].any()
                        for visit, keys_shown in zip(visits, np.asarray(shown), strict=True):
                            np.add.at(visit, keys_shown[keys_shown >= 0], 1)
                    np.testing.assert_array_equal(visits[inside], expected[inside])
    assert min(whole, masked) > 200
