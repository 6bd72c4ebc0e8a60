"""Constants of a softmax in base 2: the kernels multiply scores by `LOG2_E` and compute `exp2` instead of `exp`."""

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
