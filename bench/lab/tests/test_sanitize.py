"""Reports of compute-sanitizer are counted and located; the control kernels compile for Hopper without a GPU."""

import pytest

from bench.lab import sanitize
from tests.support.commands import ROOT, finish, start
from tests.support.hopper import needs_hopper, needs_triton

FOLDER = ROOT / "zigzag_kernels" / "hopper"


def at(file, text, offset=0):
    """Return a place of the dK/dV kernel as the tools print it.

    The place is `offset` lines behind the first line of `file` with `text`.
    """
    source = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(source, 1) if text in line) + offset
    return f"backward_dkdv_hopper+0x1f0 in {FOLDER / file}:{number}", number


STORE, STORE_LINE = at("rows.py", "stream.lse2.index(stage).store(lse2)")
LOAD, LOAD_LINE = at("dkdv.py", "lse2 = stream.numbers(stream.lse2, i)")
HEAD, _ = at("dkdv.py", "def backward_dkdv_hopper(")
SPECIALIZE, _ = at("dkdv.py", "    specialize_warps(")
RACECHECK = f"""\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at {STORE}
=========     and Read access at {LOAD} [4 hazards]
=========     and Write access at {STORE} [12 hazards]
=========
========= Warning: Race reported between Read access at {HEAD}
=========     and Write access at {SPECIALIZE} [384 hazards]
=========
========= Warning: Race reported between Read access at 0x570 in control_stores
=========     and Write access at 0x540 in control_stores [1 hazard]
=========
========= Warning: Detected overflow of tracked cuda::barrier structures. Results might be incorrect. Try using \
--num-cuda-barriers to fix the issue
launched backward_dkdv_hopper
========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)
"""
HAZARDS = f"""\
========= Error: Potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :
=========     Write Thread (0,0,0) at {HEAD}
=========     Write Thread (1,0,0) at {SPECIALIZE}
=========     Current Value : 1, Incoming Value : 2
=========
========= Error: Potential RAW hazard detected at __shared__ 0x4 in block (0,0,0) :
=========     Write Thread (288,0,0) at {STORE}
=========     Read Thread (1,0,0) at {LOAD}
=========     Current Value : 1
=========
"""
INITCHECK = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::fill<at::native::Fill<float>, at::detail::Array<char *, (int)1>>(int, T2)+0x70
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= Invalid __shared__ write of size 2 bytes
=========     at a_kernel+0x70 in /nowhere/kernel.cu:41
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""


def test_reports_are_counted_by_kernel_kind_and_place():
    stored, loaded = f"rows.py:{STORE_LINE} produce_rows", f"dkdv.py:{LOAD_LINE} _block"
    assert sanitize.read_reports(RACECHECK) == {
        ("backward_dkdv_hopper", "race: Write, Read", f"{stored} | {loaded}"): 4,
        ("backward_dkdv_hopper", "race: Write, Write", f"{stored} | {stored}"): 12,
        ("backward_dkdv_hopper", "race: Read, Write", f"{sanitize.TRITONS_OWN} | {sanitize.TRITONS_OWN}"): 384,
        ("control_stores", "race: Read, Write", "0x570 | 0x540"): 1,
    }
    assert sanitize.read_reports(HAZARDS) == {
        ("backward_dkdv_hopper", "hazard: WAW", f"{sanitize.TRITONS_OWN} | {sanitize.TRITONS_OWN}"): 1,
        ("backward_dkdv_hopper", "hazard: RAW", f"{stored} | {loaded}"): 1,
    }
    assert sanitize.read_reports(INITCHECK) == {
        ("at::native::fill", "Uninitialized __global__ memory read of size 4 bytes", "0x70"): 1,
        ("a_kernel", "Invalid __shared__ write of size 2 bytes", "kernel.cu:41"): 1,
    }
    assert not sanitize.read_reports("launched x\n========= ERROR SUMMARY: 0 errors\n")


def test_the_table_and_the_logs_of_a_run(tmp_path, monkeypatch, capsys):
    """A stand-in for the binary, that prints what racecheck would."""
    (tmp_path / "printed").write_text(RACECHECK)
    binary = tmp_path / sanitize.NAME
    binary.write_text(f'#!/bin/sh\ncase "$*" in "--tool racecheck "*control) cat {tmp_path}/printed; exit 1;; esac\n')
    binary.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_binary", lambda: str(binary))
    arguments = ["--kernels", "control", "--logs", str(tmp_path / "logs"), "--", "--racecheck-report", "all"]
    assert sanitize.main(arguments) == 1
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith("| racecheck")]
    assert rows[-1] == "| racecheck | control | control_stores | race: Read, Write | 0x570 and 0x540 | 1 |"
    assert len(rows) == 4
    assert rows[0].endswith(f"{sanitize.TRITONS_OWN} and {sanitize.TRITONS_OWN} | 384 |")
    assert any("overflow of tracked" in line for line in printed)
    assert (tmp_path / "logs" / "racecheck-control.txt").read_text() == RACECHECK
    assert printed[-1] == "errors under racecheck (control kernels)"


@needs_triton
def test_the_control_kernels_compile_to_what_they_are_to_show(triton_cache):
    """Compile in another process, because this one may interpret kernels."""
    (ended,) = finish(start("-m", "bench.lab.tests.compile_control", **triton_cache))
    assert ended.code == 0, ended.errors[-2000:]
    names = "partitions", "tma", "stores", "both", "wgmma", "race"
    assert ended.lines == [f"control_{name}" for name in names]


@pytest.mark.gpu
@needs_hopper
def test_the_control_kernels_are_right():
    assert len(sanitize.launch(sanitize.CONTROL)) == 6
