"""Decides, before anything imports triton or jax, whether this process interprets kernels (no GPU) or compiles them."""

import gc
import importlib.metadata
import os
import subprocess


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)
    except FileNotFoundError:
        return []
    numbers = [str(i) for i in range(len(found.stdout.splitlines()))] if found.returncode == 0 else []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return numbers if chosen is None else [name for name in chosen.split(",") if name][: len(numbers)]


GPUS = _gpus()
GPU = bool(GPUS)
# Seconds. The first ends what hangs, however busy the machine is: nothing that does not hang comes near it. The second
# is how much later than another a process or a thread may come because the machine is busy. Tests in which one comes
# too late on purpose wait so long.
HANGS, LATENESS = 1500, 4.0
# How long the examples train, and by how much losses may differ between numbers of ranks: sums in another order round
# differently, and training lets that grow (9.5e-5 in 200 steps on two H200).
STEPS, TOLERANCE = (200, 5e-4) if GPU else (4, 2e-5)
# Variables that are set here, but not for the processes that tests start as from a shell.
CHOSEN = ("XLA_PYTHON_CLIENT_PREALLOCATE",) if GPU else ("TRITON_INTERPRET", "JAX_PLATFORMS", "XLA_FLAGS", "NPROC")
# A test runs what XLA compiles for it once or twice: compiling is most of its time, and optimising most of that.
# XLA ends a process one of whose devices, which are threads, comes 40 seconds late to a collective: that is no hang.
XLA_ON_CPU = ["--xla_backend_optimization_level=0", f"--xla_cpu_collective_call_terminate_timeout_seconds={HANGS}"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # In one piece, without LLVM's slow passes and by the older emitters, which later releases do not have: a quarter of
    # the time.
    XLA_ON_CPU += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    XLA_ON_CPU += ["--xla_llvm_disable_expensive_passes=true"]
if GPU:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch shares the GPU
else:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    devices = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = " ".join([devices, *XLA_ON_CPU, os.environ.get("XLA_FLAGS", "")])
    # With two threads, jax 0.10 can wait for ever inside a host callback.
    os.environ.setdefault("NPROC", "16")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before NumPy is imported. Workers share the cores, and threads that each of them starts for a product wait for one
    # another: with 15 on 16 cores the oracle of one case took more than five minutes, so less than 15 seconds.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before torch is imported, whose threads wait for one another by counting: twenty steps of a model of one layer took 14
# seconds on two busy cores, and two thirds of a second in one thread. Processes that tests start share the cores too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The interpreter makes objects by the million and no cycles to speak of: looking for some takes a tenth of its time.
gc.set_threshold(100_000, 50, 100)
