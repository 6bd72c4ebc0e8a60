"""Kernels for Hopper in Gluon, behind the same plan and tables as the portable ones.

They run a problem if `rules` says that they can run it and expects them to be faster. `ZIGZAG_HOPPER` overrides the
expectation: with 0 the portable kernels always run, with 1 these run wherever they can. The variable is read when a
problem is first seen.
"""
