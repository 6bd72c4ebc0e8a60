"""Constants of a softmax in base 2: the kernels compute `exp2` of scores that are scaled by `LOG2_E`."""

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
