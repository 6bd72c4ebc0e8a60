"""Batches that halos serve: windows of one key to a whole chunk, chunks of attention, packings, both layouts."""

from tests.support.cases import Case


def _halo(name, world_size, lengths, **changes):
    return Case(name=name, world_size=world_size, lengths=lengths, **changes)


HALOS = (
    # Halos of one row, smaller than a chunk of 12, of all its rows.
    _halo("w2-one-key", 2, (48,), window_size=(0, -1)),
    _halo("w2-one-row", 2, (48,), window_size=(1, -1), heads=4, kv_heads=2, dtype="bfloat16"),
    _halo("w2-few-rows", 2, (48,), window_size=(5, 0), causal=False, padding=3, sinks=True, softcap=2.0),
    _halo("w2-all-rows", 2, (48,), window_size=(12, -1), heads=4, kv_heads=2, sinks=True),
    _halo("w2-several-tiles", 2, (400,), window_size=(70, -1), heads=1),
    _halo("w2-chunks", 2, (64, 32), attention_chunk=7, padding=2, dtype="float16"),
    _halo("w2-packed", 2, (32, 0, 20, 64), window_size=(5, -1), heads=4, kv_heads=2, padding=4, dtype="bfloat16"),
    # Documents that end before their third chunk need no more than the one before.
    _halo("w2-short", 2, (40, 8, 12, 4), window_size=(9, -1), lengths_real=(33, 4, 5, 0), sinks=True, softcap=1.5),
    _halo("w3-packed", 3, (66, 30, 0, 90), window_size=(5, -1), heads=6, kv_heads=2, padding=1, sinks=True),
    _halo("w3-all-rows", 3, (66,), window_size=(11, -1), lengths_real=(50,), dtype="bfloat16"),
    _halo("w4-packed", 4, (64, 40, 120), window_size=(5, -1), heads=4, kv_heads=2, sinks=True),
    # The row layout: documents over the borders of chunks, shorter and longer than the window, several rows.
    _halo("w2-row", 2, (13, 0, 30, 1, 18), layout="row", padding=2, window_size=(6, -1), sinks=True),
    _halo("w2-row-batch", 2, (13, 27, 40, 22, 14), layout="row", padding=4, row_length=40, window_size=(10, -1)),
    _halo(
        "w3-row", 3, (50, 7, 30), layout="row", padding=3, window_size=(11, -1), lengths_real=(47, 7, 30),
        heads=4, kv_heads=2, softcap=2.0, sinks=True, dtype="bfloat16",
    ),
    _halo("w4-row", 4, (70, 3, 40), layout="row", padding=7, attention_chunk=9),
)  # fmt: skip


def reach_options(case):
    """Keyword arguments of `prepare_batch` that say how far the rows of `case` see."""
    return {"window_size": case.window_size, "attention_chunk": case.attention_chunk}
