"""Head dims 64 and 128 with tile sizes of your own: `python examples/custom_config.py`.

ZIGZAG_KERNEL_CONFIG names a JSON file whose entries replace entries of `zigzag_kernels/tiles/`. It is read when a
problem is first seen, so it is set before the first call. These tiles are for the portable kernels, so ZIGZAG_HOPPER=0
leaves the calls to them on a Hopper GPU too. Tile sizes are of compiled kernels: without a GPU this runs the plain
reference, and shows which file would have been read.
"""

import json
import os
import tempfile

import torch

from zigzag_kernels.families import choose_tiles, family_of, kernels_by_name
from zigzag_torch import ZigzagConfig, fused_zigzag_llama3_flash_attn_forward_v2

TILES = {
    "64": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "128": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
}


def main():
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    target = ".".join(map(str, torch.cuda.get_device_capability())) if gpu else "9.0"
    kernel = kernels_by_name()["forward"]
    tables = {family_of(kernel).architecture(target).name: {"16-bit": {"forward": TILES}}}
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(tables, file)
    os.environ |= {"ZIGZAG_KERNEL_CONFIG": file.name, "ZIGZAG_HOPPER": "0"}
    try:
        for head_dim in (64, 128):
            print(f"head_dim {head_dim}: {choose_tiles(kernel, head_dim, 'float16', target)}")
            q0, q1 = (torch.randn(128, 8, head_dim, dtype=torch.float16, device=device) for _ in range(2))
            k, v = (torch.randn(1024, 8, head_dim, dtype=torch.float16, device=device) for _ in range(2))
            # Rank 0 of 4: chunks 0 and 7 of a sequence of 1024 tokens.
            rows, keys = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (128, 1024))
            with ZigzagConfig(verify_correctness=True):
                out0, out1, lse0, lse1 = fused_zigzag_llama3_flash_attn_forward_v2(
                    q0, q1, k, v, rows, rows, keys, chunk_idx_0=0, chunk_idx_1=7, total_chunks=8
                )
            print(f"  out {tuple(out0.shape)} and {tuple(out1.shape)}, lse {tuple(lse0.shape)} and {tuple(lse1.shape)}")
    finally:
        os.remove(file.name)


if __name__ == "__main__":
    main()
