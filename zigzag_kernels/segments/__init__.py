"""The segment tables tell a kernel which query rows a rank holds, and where the keys of those rows are.

Words used here and in the kernels (`layout.py` has the layout itself):

- *segment*: a run of query rows at consecutive positions of one sequence. A zigzag rank holds two per sequence, its
  *halves*: the early chunk and the late one.
- *row*: with grouped-query attention the `GROUP` query heads of one KV head are rows of one tile, so that a segment of
  `n` tokens has `n * GROUP` rows: row `r` is token `r // GROUP`, head `r % GROUP`. Short chunks fill tiles that way,
  and K/V are read once for the group.
- *key*: an index into the keys of one sequence, in position order. Row `r` of a segment sees the keys
  `[0, min(kv_len, diagonal + token + 1))`; without a causal mask `diagonal` is `kv_len`, which hides nothing.
  In a segment with `kv_len > 0` every row sees key 0, so a running maximum is finite after the first block.
- *slot*: a K/V buffer is `SLOTS` slots of `slot_rows` rows. Gathered K/V have one slot a rank, each with its early and
  its late chunks; in the other layouts all keys of a sequence follow each other, in one slot.
- *window*: K/V of a few KV heads at a time, from `first_kv_head` on; queries and results have all heads.
- *padding*: rows behind the last sequence. It is the last entry of both tables.

`columns.py` names the columns of both tables and imports nothing but the standard library. `build.py` has the
kernel that writes the tables, `lookup.py` the functions by which attention kernels read them, and `ranges.py` the rule
of masks in which each row sees a range of keys.
"""
