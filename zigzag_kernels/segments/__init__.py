"""The segment tables tell a kernel which query rows a rank holds, and where the keys of those rows are.

These words are used here and in the kernels; `layout.py` defines the layouts:

- *segment*: a run of query rows at consecutive positions of one sequence. A zigzag rank holds two per sequence, its
  *halves*: the early chunk and the late one.
- *row*: with grouped-query attention the `GROUP` query heads of one KV head are rows of one tile, so that a segment of
  `n` tokens has `n * GROUP` rows: row `r` is token `r // GROUP`, head `r % GROUP`. So even short chunks fill tiles, and
  a program reads K/V once for the whole group.
- *key*: an index into the keys of one sequence, in position order. Row `r` of a segment sees the keys
  `[0, min(kv_len, diagonal + token + 1))`; without a causal mask `diagonal` is `kv_len`, which hides no key.
  In a segment with `kv_len > 0` every row sees key 0, so a running maximum is finite after the first block.
- *slot*: a K/V buffer has `SLOTS` slots of `slot_rows` rows. Gathered K/V have one slot for each rank, with its early
  and its late chunks, and a buffer of halos has four (`halo.HaloSlot`). In the other layouts one slot holds all keys of
  a sequence, in position order.
- *window*: a buffer may hold K/V of only a few KV heads, from `first_kv_head` on; queries and results have all heads.
- *padding*: the rows behind the last sequence. The last entry of both tables describes them.

`columns.py` names the columns of both tables and imports nothing but the standard library. `build.py` has the
kernel that writes the tables, `lookup.py` the functions by which attention kernels read them, and `ranges.py` the rule
of masks in which each row sees a range of keys.
"""
