"""Kernels for Hopper in Gluon, behind the same plan and tables as the portable ones.

They serve where `rules` say that they can and are expected to be faster. `ZIGZAG_HOPPER`, read when a problem is first
seen, is 0 for the portable kernels always, and 1 for these wherever they can run. docs/hopper.md has their speed.
"""
