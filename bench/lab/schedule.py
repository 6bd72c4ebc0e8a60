"""Prints which transfers XLA's scheduler puts beside each kernel, between H100s that need not be there.

    pip install --no-deps --target DIR jax-cuda13-pjrt==VERSION jax-cuda13-plugin==VERSION nvidia-cuda-nvcc
    PYTHONPATH=DIR python -m bench.lab.schedule --ranks 4 --tokens 8192
    PYTHONPATH=DIR python -m bench.lab.schedule --ranks 4 --tokens 8192 --in-flight 3 --backward

VERSION is the version of jaxlib. XLA compiles the whole step for a description of the GPUs; nothing is executed or
timed.
"""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("TRITON_INTERPRET", None)
nvidia = importlib.util.find_spec("nvidia")
folders = [Path(path) / "cu13" for path in (nvidia.submodule_search_locations or [])] if nvidia else []
for folder in folders:
    if (folder / "bin" / "ptxas").exists():
        os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={folder} {os.environ.get('XLA_FLAGS', '')}"
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax
from bench.arguments import positive
from bench.lab.transfers import beside_kernels

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
LIMIT = "xla_gpu_experimental_parallel_collective_overlap_limit"


def scheduled(options: argparse.Namespace) -> str:
    """Return the scheduled program of one step of attention between the GPUs."""
    topology = topologies.get_topology_desc("", "cuda", target_config=H100, topology=f"1x1x{options.ranks}")
    mesh, rows = Mesh(np.array(topology.devices), ("cp",)), P("cp")

    def step(q, k, v, dout, cu_seqlens):
        def attend(q, k, v):
            stride = {"axis_name": "cp", "method": options.method, "heads_k_stride": options.stride}
            return zigzag_jax.zigzag_attention(q, k, v, cu_seqlens, **stride)

        out, pullback = jax.vjp(attend, q, k, v)
        return (out, *pullback(dout)) if options.backward else (out,)

    def struct(heads):
        shape = options.ranks * options.tokens, heads, options.head_dim
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, rows))

    q, kv = struct(options.heads), struct(options.kv_heads)
    offsets = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=NamedSharding(mesh, P()))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(rows,) * 4 + (P(),), out_specs=rows)
    with zigzag_jax.lower_for("9.0"):
        lowered = jax.jit(mapped).trace(q, kv, kv, q, offsets).lower()
    return lowered.compile({LIMIT: options.in_flight}).as_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=4, help="GPUs of one machine (default 4)")
    parser.add_argument("--tokens", type=positive, default=8192, help="rows of each (default 8192)")
    parser.add_argument("--heads", type=positive, default=32)
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--method", choices=("allgather", "ring"), default="allgather")
    parser.add_argument("--stride", type=positive, help="KV heads of a window (default as in attention)")
    parser.add_argument("--backward", action="store_true", help="both passes")
    parser.add_argument("--in-flight", type=positive, default=1, help=f"{LIMIT} (default 1, as XLA's)")
    for kernel, transfers in beside_kernels(scheduled(parser.parse_args())):
        print(f"{kernel:>17} | {', '.join(transfers) or '-'}")


if __name__ == "__main__":
    main()
