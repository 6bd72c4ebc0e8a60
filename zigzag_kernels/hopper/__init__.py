"""Kernels for Hopper in Gluon, behind the same plan and tables as the portable ones."""
