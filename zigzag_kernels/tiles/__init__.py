"""Tile sizes as data: one file per GPU generation, and the file by which users replace entries."""
