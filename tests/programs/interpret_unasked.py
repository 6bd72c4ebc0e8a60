"""Asks JAX's front end for the interpreter without TRITON_INTERPRET, and prints the error."""

from zigzag_jax.launch import choose_backend

try:
    choose_backend("interpret")
except RuntimeError as error:
    print(error)
