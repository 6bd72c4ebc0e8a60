"""Profiles forward and backward of the fused path, and of the unfused one for comparison.

    python bench/profile_detailed.py

Prints the profiler's table and the times of every launch, and writes trace.json for chrome://tracing or Perfetto.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.profiler import ProfilerActivity, profile

from bench.grouped import DEVICE, calls, with_gradients
from zigzag_torch import ZigzagConfig, profile_report

LENGTHS, CALLS = ([2048], 10) if DEVICE == "cuda" else ([256], 2)


def main():
    paths, leaves = calls(4, LENGTHS, 32, 8, 128)
    for call in paths.values():  # compiles
        with_gradients(call, leaves)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with ZigzagConfig(profile_kernels=True), profile(activities=activities, acc_events=True) as profiler:
        for call in paths.values():
            for _ in range(CALLS):
                with_gradients(call, leaves)
    print(profiler.key_averages().table(sort_by=f"{DEVICE}_time_total", row_limit=20))
    profile_report()
    profiler.export_chrome_trace("trace.json")


if __name__ == "__main__":
    main()
