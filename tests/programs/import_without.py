"""Imports a module where others cannot be imported, and prints which modules of a list were imported with it.

python -m tests.programs.import_without MODULE --missing torch jax --seen triton
"""

import argparse
import importlib
import sys

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("module")
parser.add_argument("--missing", nargs="*", default=[])
parser.add_argument("--seen", nargs="*", default=[])
options = parser.parse_args()
# A module that is None in sys.modules cannot be imported: ImportError, whoever tries.
sys.modules.update(dict.fromkeys(options.missing))
importlib.import_module(options.module)
print(*(name for name in options.seen if name in sys.modules))
