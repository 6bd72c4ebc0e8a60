"""Records every launch of both front ends and the code it compiles to, and compares two records: see `__main__`."""
