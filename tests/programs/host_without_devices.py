"""Makes a batch by `zigzag_jax.host`, and prints whether JAX has looked for devices."""

from jax._src import xla_bridge

from zigzag_jax import host

batch = host.shard_documents([[1, 2, 3], [4]], 2)
host.unshard_rows(batch.labels, batch)
batch.specs()
print(xla_bridge.backends_are_initialized())
