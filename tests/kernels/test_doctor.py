"""What the doctor says of machines that are well and of machines that are not."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest

from tests.support.commands import ROOT
from tests.support.machine import GPU, HANGS
from zigzag_jax import launch
from zigzag_kernels import doctor
from zigzag_kernels.doctor import Machine, describe, diagnose
from zigzag_kernels.hopper import rules

WELL = {"gpu": True, "cuda": "13.0", "amd": False, "backend": "triton", "seconds": 0.5}
HOPPER = Machine(
    versions={
        "python": "3.12.3", "torch": "2.11.0+cu130", "triton": "3.6.0", "jax": "0.11.2", "jaxlib": "0.11.2",
        "jax-triton": "0.3.1", "numpy": "2.3.5",
    },
    gpus=[("NVIDIA H100 80GB HBM3", "9.0")],
    reports={"PyTorch": WELL, "JAX": WELL},
)  # fmt: skip
LAPTOP = replace(
    HOPPER, gpus=[], reports={name: WELL | {"gpu": False, "backend": "reference"} for name in HOPPER.reports}
)


def changed(machine, reports=None, environment=None, gpus=None, processors=64, **versions):
    """`machine` with other versions, None for a package that is missing."""
    versions = machine.versions | {name.replace("_", "-"): version for name, version in versions.items()}
    return replace(
        machine,
        versions={name: version for name, version in versions.items() if version is not None},
        reports=machine.reports | (reports or {}),
        environment=environment or {},
        gpus=machine.gpus if gpus is None else gpus,
        processors=processors,
    )


SUPPORTED = "jax>=0.10' 'jax-triton>=0.3.1,<0.4"
NEWEST = {"jax": "0.12.0.1", "jax_triton": "0.4.1", "triton": "3.9.0"}
SICK = {
    "python": (changed(HOPPER, python="3.10.12"), "Python 3.10.12 is too old", "python3.11"),
    "no framework": (changed(HOPPER, torch=None, jax=None), "Neither PyTorch nor JAX", "torch>=2.11"),
    "old torch": (changed(HOPPER, torch="2.9.1"), "PyTorch 2.9.1 is too old", "torch>=2.11"),
    "old triton": (changed(HOPPER, triton="3.5.1"), "Triton 3.5.1 is too old", "triton>=3.6"),
    "no triton": (changed(HOPPER, triton=None), "Triton, .*, is not installed", "triton>=3.6"),
    "old jax": (changed(HOPPER, jax="0.9.2"), "JAX 0.9.2 is too old", SUPPORTED),
    "what pip picks": (changed(HOPPER, **NEWEST), "jax-triton 0.4.1 fails to trace any kernel", SUPPORTED),
    "no jax-triton": (changed(HOPPER, jax_triton=None), "jax-triton 0.3.1 or newer, .*, is not", "jax-triton>=0.3.1"),
    "stubbed": (changed(HOPPER, jax_triton="0.4.1"), "jax-triton 0.4.1 does not work with Triton 3.6.0", "==0.3.1"),
    "ptx": (changed(HOPPER, triton="3.9.0", nvidia_cuda_nvcc="13.0.88"), "CUDA 13.0.88 rejects what Triton", "<3.9"),
    "old gpu": (changed(HOPPER, gpus=[("Tesla V100", "7.0")]), "compute capability 7.0", "CUDA_VISIBLE_DEVICES"),
    "interpreting": (changed(HOPPER, environment={"TRITON_INTERPRET": "1"}), "nothing is compiled", "unset TRITON"),
    "flag": (changed(LAPTOP, environment={"ZIGZAG_PROFILE_KERNELS": "yes"}), "KERNELS is 'yes'", "unset ZIGZAG_PROF"),
    "misspelt": (
        changed(LAPTOP, environment={"ZIGZAG_VERIFY_CORECTNESS": "1"}),
        "ZIGZAG_VERIFY_CORECTNESS is set, and nothing reads it: ZIGZAG_VERIFY_CORRECTNESS is probably meant",
        "unset ZIGZAG_VERIFY_CORECTNESS",
    ),
    "unknown": (
        changed(LAPTOP, environment={"ZIGZAG_WINDOW": "4"}),
        "ZIGZAG_WINDOW is set, and nothing reads it: there are ZIGZAG_AGREEMENT_TIMEOUT, ZIGZAG_AGREE_IN_EVERY_CALL, ",
        "unset ZIGZAG_WINDOW",
    ),
    "timeout": (
        changed(LAPTOP, environment={"ZIGZAG_AGREEMENT_TIMEOUT": "-1"}),
        "ZIGZAG_AGREEMENT_TIMEOUT is '-1', not a positive number of seconds",
        "unset ZIGZAG_AGREEMENT_TIMEOUT",
    ),
    "no number": (
        changed(LAPTOP, environment={"ZIGZAG_AGREEMENT_TIMEOUT": "2m"}),
        "ZIGZAG_AGREEMENT_TIMEOUT is '2m', not a number of seconds",
        "unset ZIGZAG_AGREEMENT_TIMEOUT",
    ),
    "no file": (
        changed(LAPTOP, environment={"ZIGZAG_KERNEL_CONFIG": "/no/such/file"}),
        "ZIGZAG_KERNEL_CONFIG is '/no/such/file', which is no file of tiles: .*No such file",
        "unset ZIGZAG_KERNEL_CONFIG",
    ),
    "cpu build": (changed(HOPPER, {"JAX": WELL | {"gpu": False}}), "JAX does not see the GPU", r"jax\[cuda13\]"),
    "amd": (changed(HOPPER, {"PyTorch": WELL | {"amd": True}}), "for AMD GPUs", "--force-reinstall torch"),
    "broken": (
        changed(LAPTOP, {"JAX": {"error": "ImportError: no"}}),
        "JAX failed: ImportError: no",
        "zigzag_jax.self",
    ),
}


@pytest.mark.parametrize("case", SICK)
def test_one_problem_and_what_mends_it(case):
    machine, text, command = SICK[case]
    (finding,) = (finding for finding in diagnose(machine) if not finding.note)
    assert re.search(text, finding.text)
    assert re.search(command, finding.command)


@pytest.mark.parametrize(
    "machine",
    [
        HOPPER,
        LAPTOP,
        changed(HOPPER, jax=None, jaxlib=None, jax_triton=None),
        changed(HOPPER, torch=None),
        changed(HOPPER, jax=None, torch="2.14.0", triton="3.8.0"),
        changed(HOPPER, torch=None, triton="3.9.0", jax_triton="0.4.1", nvidia_cuda_nvcc="13.1.2"),
        changed(LAPTOP, jax_triton=None),
        changed(HOPPER, jax_triton="0.4.1", triton="3.9.0", nvidia_cuda_nvcc="13.1.2"),
        changed(HOPPER, environment={"TRITON_INTERPRET": "0", "ZIGZAG_USE_FUSED_TRITON_V2": "0"}),
        changed(
            HOPPER, environment={"ZIGZAG_AGREEMENT_TIMEOUT": "0.5", "ZIGZAG_KERNEL_CONFIG": "", "ZIGZAG_HOPPER": "1"}
        ),
        changed(HOPPER, jax="0.12.0.1", jaxlib="0.12.0.1", triton="3.9.0", torch=None),
    ],
)
def test_nothing_is_wrong(machine):
    assert not list(diagnose(machine))


def test_what_does_not_concern_everyone_is_a_note():
    for machine, command in (
        (changed(LAPTOP, triton=None), "triton>=3.6"),
        (changed(LAPTOP, numpy="2.4.0"), "numpy<2.4"),
        (changed(LAPTOP, jax="0.10.2", processors=2), "NPROC=16"),
        (changed(HOPPER, jax=None, torch="2.16.0", triton="3.10.0"), "'triton>=3.6,<3.10' 'torch>=2.11'"),
        (changed(HOPPER, torch=None, triton="3.10.0", jax_triton="0.4.1", nvidia_cuda_nvcc="13.1.2"), "<3.10'"),
        (changed(HOPPER, jax="0.10.0"), "jax>=0.10.1"),
        (changed(LAPTOP, transformers="4.57.1"), "'transformers>=5.17,<6'"),
        (changed(LAPTOP, transformers="6.0.0"), "'transformers>=5.17,<6'"),
    ):
        (finding,) = diagnose(machine)
        assert finding.note
        assert command in finding.command


@pytest.mark.parametrize(
    ("capability", "table"), [("8.0", "sm_80"), ("8.9", "sm_86"), ("10.0", "sm_90"), ("12.0", "sm_86")]
)
def test_a_gpu_that_no_tiles_were_measured_on_is_a_note(capability, table):
    (finding,) = diagnose(changed(HOPPER, gpus=[("A GPU", capability)]))
    assert finding.note
    assert finding.text == f"A GPU, compute capability {capability}, takes the tiles of {table}, not measured on it"
    assert "bench/tune.py" in finding.command


def test_what_is_there_is_listed():
    lines = describe(changed(HOPPER, {"JAX": {"error": "no"}}))
    for line in (
        "torch             2.11.0+cu130",
        "CUDA of PyTorch   13.0",
        "GPU               NVIDIA H100 80GB HBM3, compute capability 9.0",
        "PyTorch           backend triton, self-test passed in 0.5 s",
        "JAX               backend none, self-test failed",
    ):
        assert line in lines


def test_the_packages_ask_for_what_the_doctor_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["requires-python"] == ">=3.11"
    assert project["dependencies"][0].startswith("triton>=3.6")
    assert {"torch>=2.11", "numpy"} <= set(extras["torch"])
    assert {"jax>=0.10", "jax-triton>=0.3.1,<0.4"} <= set(extras["jax"])
    assert "transformers>=5.17,<6" in extras["hf"]
    assert extras["cuda"][0] in doctor.FRONT_ENDS["JAX"][2]
    module, function = project["scripts"]["zigzag-doctor"].split(":")
    assert getattr(sys.modules[module], function) is doctor.main


def test_the_doctor_knows_what_the_kernels_for_hopper_need():
    assert rules.TRITON == ("3.6.", "3.7.", "3.8.", "3.9.")
    assert launch.GLUON_JAX == (0, 10, 1)


def test_every_variable_that_is_read_is_known(monkeypatch):
    """By the doctor, which would call it misspelt otherwise."""
    read = {
        name
        for package in ("zigzag_kernels", "zigzag_torch", "zigzag_jax")
        for file in (ROOT / package).rglob("*.py")
        for name in re.findall(r'"(ZIGZAG_[A-Z0-9_]+)"', file.read_text())
    }
    assert len(read) >= 6
    findings = list(diagnose(changed(LAPTOP, environment=dict.fromkeys(read, "no such value"))))
    assert {finding.text.split()[0] for finding in findings} == read
    assert not any("nothing reads it" in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object of architecture names"),
        ('{"sm_89": {}}', "expected architecture"),
        ('{"sm_90": {"16-bit": {"forward": {"64": {"BLOCK_M": 17}}}}}', "expected a field BLOCK_N"),
        ('{"sm_90": {"16-bit": {"forward": {"64": []}}}}', "sm_90: 16-bit: forward: 64"),
    ],
)
def test_a_file_of_tiles_is_checked(contents, fault, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(contents)
    (finding,) = diagnose(changed(LAPTOP, environment={"ZIGZAG_KERNEL_CONFIG": str(path)}))
    assert re.search(f"which is no file of tiles: .*{fault}", finding.text)


def run_doctor(directory=ROOT, **environment):
    command = [sys.executable, "-P", "-m", "zigzag_kernels.doctor"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, cwd=directory, env=env, check=False)


@pytest.mark.slow
def test_on_this_machine_in_a_folder_whose_files_are_not_imported(tmp_path):
    """Some folders have a torch.py or a jax.py; this one's raise."""
    for name in ("torch", "jax", "json"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('a file of the folder was imported')")
    found_so_far = os.environ.get("PYTHONPATH")  # may be where a package of the GPU machine is
    result = run_doctor(tmp_path, PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [found_so_far])]))
    assert result.returncode == 0, result.stdout + result.stderr
    backend = "triton" if GPU else "reference"
    assert f"PyTorch           backend {backend}, self-test passed" in result.stdout
    assert f"JAX               backend {backend}, self-test passed" in result.stdout
    assert result.stdout.endswith("All is well.\n")


def test_a_missing_framework_is_not_tried(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "triton"))
    machine = doctor.examine()
    assert machine.reports.keys() == {"PyTorch"}
    assert not machine.has("jax")


@pytest.mark.slow
def test_a_problem_of_this_machine_is_found():
    """One front end is broken: the other is tried all the same."""
    result = run_doctor(JAX_PLATFORMS="no-such-platform")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Problem: The self-test of JAX failed: RuntimeError" in result.stdout
    assert "self-test passed" in result.stdout
