"""One of two processes of JAX that put a batch on the mesh, of other tokens but equal lengths if HOW is "other".

python -m tests.programs.jax_data_rank PROCESS PORT HOW
"""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax import host

process, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10)
mesh = jax.make_mesh((2,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
documents = [np.arange(1, 14), np.arange(5) + (process if how == "other" else 0)]
batch = host.shard_documents(documents, 2)
rows, same = NamedSharding(mesh, P("cp")), NamedSharding(mesh, P())
fingerprint = jax.device_put(batch.fingerprint, same)  # which JAX compares between processes
ids = jax.make_array_from_callback(batch.input_ids.shape, rows, lambda index: batch.input_ids[index])
print(int(jax.jit(lambda ids: ids.sum(), out_shardings=same)(ids)), flush=True)
