"""Compiles the control kernels for Hopper, and checks that each has the constructs that it is to show.

python -m bench.lab.tests.compile_control
"""

from bench.lab import sanitizer_control as control
from zigzag_jax import launch_gluon

for name in control.VARIANTS:
    constants = control.constants(name)
    kinds = "*fp16", "*fp16", "*fp32"
    compiled = launch_gluon.compile_kernel(control._control, "9.0", kinds, tuple(constants.items()), 4, 1)
    ptx = compiled.asm["ptx"]
    assert ("cp.async.bulk.tensor" in ptx) == constants["TMA"], name
    assert ("wgmma" in ptx) == constants["WGMMA"], name
    assert ("setmaxnreg" in ptx) == constants["PARTITIONS"], name
    assert ("mbarrier.try_wait" in ptx) == constants["RING"], name
    print(compiled.metadata.name)
