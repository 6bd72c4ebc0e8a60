"""Prints how many operators of this library `torch.utils.flop_counter` knows.

    python -m tests.programs.flop_formulas zigzag_torch

The argument is the module that is imported first, of `zigzag_torch` and `torch.utils.flop_counter`.
"""

import importlib
import sys

for module in (sys.argv[1], "zigzag_torch", "torch.utils.flop_counter"):
    importlib.import_module(module)

registry = sys.modules["torch.utils.flop_counter"].flop_registry
print(sum(str(name).startswith("zigzag.") for name in registry), "formulas")
