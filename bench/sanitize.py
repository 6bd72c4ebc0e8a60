"""Runs a small case of every kernel under NVIDIA's compute-sanitizer.

    python bench/sanitize.py [--tools memcheck racecheck initcheck] [--kernels portable hopper]
    compute-sanitizer --tool memcheck python bench/sanitize.py --launch portable

The first finds the binary, in PATH, CUDA's folders or a pip package, and runs the second with each tool and kind of
kernel. Ends with status 1 if one finds an error, and with 77 if there is no such binary.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TOOLS = "memcheck", "racecheck", "initcheck"
KINDS = {"portable": "0", "hopper": "1"}  # and what ZIGZAG_HOPPER says
NAME = "compute-sanitizer"
ABSENT = f"no {NAME} in PATH, in CUDA_HOME, under /usr/local or in an nvidia pip package"
SKIPPED = 77  # what test harnesses take for "skipped"


def find_binary() -> str | None:
    """Path of the sanitizer, or None."""
    if found := shutil.which(NAME):
        return found
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += sorted(Path("/usr/local").glob("cuda*"))
    places = [home / folder / NAME for home in homes for folder in ("bin", "compute-sanitizer")]
    places += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob(f"**/{NAME}"))
    return next((str(place) for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def launch(kind, lengths=(516, 4, 0, 260), device="cuda", backend="triton") -> set[str]:
    """Every kernel, where tiles end in the middle: in one launch, in windows of KV heads, in ring steps; both ways.

    Returns the names of the kernels.
    """
    import ranks
    import timing
    from cases import Case
    from planning import Planning

    names = set()
    for head_dim in (64, 128):
        sizes = {"heads": 8, "kv_heads": 2, "head_dim": head_dim, "dtype": "bfloat16", "padding": 3}
        case = Case(name=f"head_dim {head_dim}", world_size=2, lengths=lengths, **sizes)
        tensors = timing.inputs(case, device)
        windows = ranks.pack_windows(*tensors[1:3], 1)
        with Planning(ZIGZAG_HOPPER=KINDS[kind]) as planning:
            player = ranks.Player(case, 1, tensors, 1, backend)
            for call in player.calls(windows, player.new_sums()).values():
                call()
        names |= {made.kernel.fn.__name__ for made in planning.launches}
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--kernels", nargs="+", choices=KINDS, default=tuple(KINDS))
    parser.add_argument("--launch", choices=KINDS, help="only launch these kernels, for the sanitizer to see")
    options = parser.parse_args(arguments)
    if options.launch:
        print("launched", *sorted(launch(options.launch)), flush=True)
        return 0
    binary = find_binary()
    if binary is None:
        print(f"skipped: {ABSENT}")
        return SKIPPED
    # Memory that PyTorch keeps for reuse would hide what runs over the end of an array.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool, kind in itertools.product(options.tools, options.kernels):
        print(f"{binary} --tool {tool}, {kind} kernels", flush=True)
        command = [binary, "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "--launch", kind]
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(f"{tool} ({kind} kernels)")
    print(f"errors under {', '.join(failed)}" if failed else "no errors")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
