"""Prints the warnings of a verified call on a CPU, where nothing asks for the interpreter.

python -m tests.programs.verify_without_kernels
"""

import warnings

import torch

from zigzag_torch import ZigzagConfig, zigzag_llama3_flash_attn_varlen_func

offsets = torch.tensor([0, 4], dtype=torch.int32)
q, k, v = torch.randn(3, 4, 1, 16)
with ZigzagConfig(verify_correctness=True), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    zigzag_llama3_flash_attn_varlen_func(q, k, v, offsets, offsets, 4, 4, 1, slice(0))
for warning in caught:
    print(warning.category.__name__, warning.message)
