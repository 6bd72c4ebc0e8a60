"""Makes a group of gloo, destroys it after torch._dynamo is imported, and prints the threads of gloo that are left.

torch._dynamo takes what was imported before as defaults, so that a group that somebody keeps lives until Python ends.
"""

import importlib
from pathlib import Path

import torch.distributed as dist

import zigzag_torch  # noqa: F401

store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
importlib.import_module("torch._dynamo")
dist.destroy_process_group()
print([thread.read_text() for thread in Path("/proc/self/task").glob("*/comm") if "gloo" in thread.read_text()])
