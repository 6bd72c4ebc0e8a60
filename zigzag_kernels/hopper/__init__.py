"""Kernels for Hopper in Gluon, behind the same plan and tables as the portable ones.

They run a problem if `rules` says that they can, and expects them to be faster. `ZIGZAG_HOPPER`, read when a problem is
first seen, overrides that: with 0 portable kernels always run, with 1 these run wherever they can. docs/hopper.md has
their speed.
"""
