"""JAX in several real processes: the example trains as in one, and one that fails does not leave the others waiting."""

import json

import numpy as np
import pytest

from tests.support.commands import finish, free_port, start, start_program
from tests.support.machine import GPU, GPUS, STEPS, TOLERANCE


def train(path, *options, devices, processes=1):
    """The losses of a few steps of the example on so many devices, shared evenly by the processes."""
    command = "examples/train_jax.py", "--steps", str(STEPS), "--seed", "1", "--json", str(path), *options
    if processes > 1:
        command += "--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)
    each, started = devices // processes, []
    for process in range(processes):
        own = ("--process", str(process)) if processes > 1 else ()
        if GPU:
            visible = ",".join(GPUS[process * each : (process + 1) * each])
            environment = {"CUDA_VISIBLE_DEVICES": visible, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            started.append(start(*command, *own, **environment))
        else:
            started.append(start(*command, *own, "--devices", str(each)))
    results = finish(*started)
    assert [code for code, *_ in results] == [0] * processes, results
    assert any(line.startswith(f"step {STEPS:>4}:") for line in results[0][1])
    return json.loads(path.read_text())["losses"]


@pytest.mark.slow
@pytest.mark.multigpu
def test_the_example_trains_alike_on_any_number_of_devices_and_processes(tmp_path):
    devices, processes = len(GPUS) or 4, len(GPUS) or 2
    one = train(tmp_path / "one.json", devices=1)
    assert len(one) == STEPS
    assert one[0] > one[-1]
    others = {
        "devices": train(tmp_path / "devices.json", devices=devices),
        "processes": train(
            tmp_path / "processes.json", "--method", "ring", "--data", "1", devices=devices, processes=processes
        ),
    }
    for where, losses in others.items():
        np.testing.assert_allclose(losses, one, rtol=0, atol=TOLERANCE, err_msg=where)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="processes of a CPU")
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_process_that_fails_ends_the_others(how):
    port = str(free_port())
    waiting, failing = finish(*(start_program("failing_jax_rank", str(process), port, how) for process in range(2)))
    assert waiting[1] == failing[1] == ["once"]
    assert waiting[0] != 0
    assert failing[0] != 0
    if how == "raises":
        assert "heads_k_stride: expected a divisor of the 2 KV heads, got 3" in failing[2]
