"""One of two processes of JAX, of which the second fails in its second call.

    python -m tests.programs.failing_jax_rank PROCESS PORT HOW

HOW is "raises" or "dies".
"""

import os
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax

process, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10)
mesh = jax.make_mesh((2,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
ones = np.ones((16, 2, 16), np.float32)
x = jax.make_array_from_callback(ones.shape, NamedSharding(mesh, P("cp")), lambda index: ones[index])


def attend(**options):
    out = jax.jit(zigzag_jax.make_zigzag_attention(mesh, method="ring", **options))(x, x, x)
    return np.asarray(out.addressable_shards[0].data)


assert (attend() == 1).all()
print("once", flush=True)
if process == 1 and how == "dies":
    os._exit(3)
attend(heads_k_stride=3 if process == 1 else None)
print("twice", flush=True)
