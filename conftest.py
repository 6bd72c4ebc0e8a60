"""Fixtures and marks of all tests; which kernels run is decided by `tests/support/machine.py`, imported first."""

import os

import hypothesis
import pytest

from tests.support.machine import GPU, GPUS

# No clock decides about a test: a busy machine makes an example late, and slow to draw.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("multigpu") and len(GPUS) == 1:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs or more, or a machine without any"))


@pytest.fixture(scope="session")
def kernel_backend() -> str:
    """The backend that runs the kernels themselves on this machine."""
    return "triton" if GPU else "interpret"


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory) -> dict[str, str]:
    """The environment in which processes share what they compile, with those that other workers start too."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    return {"TRITON_CACHE_DIR": str(shared / "triton")}


@pytest.fixture(scope="session")
def forks():
    """Runs scripts in forks of a process that has imported the frameworks; see `tests/support/forks.py`."""
    from tests.support.forks import Forks

    forks = Forks()
    yield forks
    forks.end()


@pytest.fixture
def each_launch_once():
    """Launches that are repeated in this test are interpreted once; see `tests/support/remembered.py`."""
    from tests.support.remembered import each_launch_once

    with each_launch_once():
        yield


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Every output of a launch from torch begins as NaN (integers as -1), so that a row left unwritten is found out."""
    from zigzag_torch import launch

    allocate = launch.allocate

    def poisoned(output, like):
        x = allocate(output, like)
        return x.fill_(float("nan") if x.is_floating_point() else -1)

    monkeypatch.setattr(launch, "allocate", poisoned)
