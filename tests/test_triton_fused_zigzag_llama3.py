"""The fused kernels against the unfused path: `python tests/test_triton_fused_zigzag_llama3.py`, or under pytest."""

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import zigzag_torch
from tests.support import pieces
from tests.support.machine import GPU

WORLD_SIZE, TOKENS, HEADS, HEAD_DIM = (4, 256, 8, 64) if GPU else (4, 32, 4, 64)
TOLERANCE = {"atol": 1e-2, "rtol": 1e-2}


def both_paths(rank):
    """For the unfused and the fused path: (q, kv, out) of `rank`, the same numbers in both."""
    generator = torch.Generator(pieces.DEVICE).manual_seed(rank)
    shapes = (TOKENS, HEADS, HEAD_DIM), (2, WORLD_SIZE * TOKENS, HEADS, HEAD_DIM)
    tensors = [torch.randn(s, dtype=torch.float16, device=pieces.DEVICE, generator=generator) for s in shapes]
    cu_seqlens = torch.tensor([0, WORLD_SIZE * TOKENS], dtype=torch.int32, device=pieces.DEVICE)
    for fused in (False, True):
        q, kv = (x.clone().requires_grad_() for x in tensors)
        arguments = pieces.grouped_arguments(q, kv, cu_seqlens, rank, WORLD_SIZE, True)
        if fused:
            arguments = pieces.fused_arguments(arguments, rank)
            out, _, _ = zigzag_torch.replace_grouped_attention_with_fused_triton_v2(**arguments)
        else:
            out, _, _ = zigzag_torch.execute_grouped_attention(**arguments)
        yield q, kv, out


def test_forward_correctness(kernel_backend):
    with pieces.kernels(kernel_backend):
        for rank in range(WORLD_SIZE):
            (_, _, original), (_, _, fused) = both_paths(rank)
            torch.testing.assert_close(fused, original, **TOLERANCE)
            if rank == 0:
                for name, out in {"original": original, "fused": fused}.items():
                    print(f"out_{name} shape: {out.shape}")
                    print(f"out_{name}: {out[0, 0, :5].detach()}")


def test_backward_correctness(kernel_backend):
    with pieces.kernels(kernel_backend):
        for rank in range(WORLD_SIZE):
            gradients = []
            for q, kv, out in both_paths(rank):
                dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(rank)).to(out)
                dq, dkv = torch.autograd.grad(out, (q, kv), dout)
                gradients.append({"dq": dq, "dk": dkv[0], "dv": dkv[1]})
            original, fused = gradients
            for name in original:
                torch.testing.assert_close(fused[name], original[name], **TOLERANCE)
                if rank == 0:
                    difference = (fused[name] - original[name]).abs().max().item()
                    print(f"{name} shape: {original[name].shape}, largest difference {difference:.1e}")


def test_the_published_path_of_this_file_leads_here():
    here = Path(__file__).resolve()
    other = here.parents[1] / "test" / here.name
    assert other.resolve() == here
    assert runpy.run_path(str(other))["both_paths"].__code__.co_code == both_paths.__code__.co_code


def main():
    backend = "triton" if GPU else "interpret"
    print(f"Fused zigzag llama3 attention against the unfused path, backend {backend}, {WORLD_SIZE} ranks")
    for title, test in (
        ("Test 1: Forward Correctness", test_forward_correctness),
        ("Test 2: Backward Correctness", test_backward_correctness),
    ):
        print(f"\n{'=' * 60}\n{title}\n{'=' * 60}")
        test(backend)
        print("passed")
    print("\nAll tests passed.")


if __name__ == "__main__":
    main()
