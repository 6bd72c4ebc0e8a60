"""An attention layer as MaxText calls its own: a mesh of four axes, q scaled and K/V whole along the sequence."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import oracle
from tests.support.packed_rows import assert_rows_are_right, dealt_out, make_rows
from tests.support.spread import mesh_of, value_and_gradients

AXES = "data", "fsdp", "context", "tensor"
BATCH = "data", "fsdp"
Q, IDS = P(BATCH, "context", "tensor"), P(BATCH, "context")
DOCUMENTS = [[(1, 6), (2, 7), (3, 3)], [(1, 16)], [(1, 2), (2, 9)], [(1, 10), (2, 6)]]
SCALE = 16**-0.5


@dataclass(frozen=True)
class AttentionOp:
    """`sliding_window_size` counts the token itself, `attn_logits_soft_cap` may be None."""

    mesh: Mesh
    sliding_window_size: int | None = None
    attn_logits_soft_cap: float | None = None

    def __call__(self, query, key, value, decoder_segment_ids, positions):
        query = jax.lax.with_sharding_constraint(query, NamedSharding(self.mesh, Q))
        heads = "tensor" if key.shape[2] % self.mesh.shape["tensor"] == 0 else None
        whole = NamedSharding(self.mesh, P(BATCH, None, heads))
        key, value = (jax.lax.with_sharding_constraint(x, whole) for x in (key, value))
        return zigzag_jax.segmented_attention(
            query,
            key,
            value,
            decoder_segment_ids,
            positions,
            mesh=self.mesh,
            axis="context",
            batch_axis=BATCH,
            head_axis="tensor",
            max_segments=4,
            window_size=(-1 if self.sliding_window_size is None else self.sliding_window_size - 1, 0),
            softcap=self.attn_logits_soft_cap or 0.0,
            softmax_scale=1.0,
            backend="reference",
            return_lse=True,
        )


@pytest.mark.parametrize(
    ("shape", "window", "softcap"),
    [((1, 2, 2, 2), None, None), ((2, 1, 4, 1), 5, 2.0), ((1, 1, 2, 4), None, None)],
    ids=str,
)
def test_a_layer_of_maxtext(shape, window, softcap):
    """In the last mesh two devices share each KV head."""
    mesh, rows = mesh_of(*shape, names=AXES), make_rows(DOCUMENTS, 16, heads=4, kv_heads=2)
    scaled = rows._replace(q=rows.q * np.float32(SCALE))  # MaxText scales q where it projects it
    ranks = shape[2]
    op = AttentionOp(mesh, sliding_window_size=window, attn_logits_soft_cap=softcap)
    arrays = dealt_out(scaled, ranks)
    specs = (Q, P(BATCH), P(BATCH), Q, P(BATCH, "tensor", "context"), IDS, IDS)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    results = jax.jit(value_and_gradients(op))(*placed)
    options = oracle.Options(window_size=(-1 if window is None else window - 1, 0), softcap=softcap or 0.0)
    assert_rows_are_right(results, DOCUMENTS, scaled, ranks, softmax_scale=1.0, options=options)
