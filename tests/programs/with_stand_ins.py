"""Runs a script with stand-ins for what ring_flash_attn imports besides torch.

python -m tests.programs.with_stand_ins SCRIPT
"""

import runpy
import sys

from tests.support import stand_ins

stand_ins.install()
runpy.run_path(sys.argv[1], run_name="__main__")
