"""Tile sizes as data, one file for each GPU generation, and the reader of files with users' own entries."""
