"""JAX in several real processes: the example trains as in one, and one that fails does not leave the others waiting."""

import json

import numpy as np
import pytest

from tests.support.commands import finish, free_port, start, start_program
from tests.support.machine import GPU, GPUS, STEPS, TOLERANCE


def train(forks, path, *options, devices, processes=1):
    """The losses of a few steps of the example on so many devices, shared evenly by the processes."""
    command = "examples/train_jax.py", "--steps", str(STEPS), "--seed", "1", "--json", str(path), *options
    if processes == 1 and not GPU:
        results = forks.run(*command, "--devices", devices)
    else:
        results = train_in_processes(command, devices, processes)
    assert [code for code, *_ in results] == [0] * processes, results
    assert any(line.startswith(f"step {STEPS:>4}:") for line in results[0][1])
    return json.loads(path.read_text())["losses"]


def train_in_processes(command, devices, processes):
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
    return finish(*started)


@pytest.mark.slow
@pytest.mark.multigpu
def test_the_example_trains_alike_on_any_number_of_devices_and_processes(forks, tmp_path):
    devices, processes = len(GPUS) or 4, len(GPUS) or 2
    one = train(forks, tmp_path / "one.json", devices=1)
    assert len(one) == STEPS
    assert one[0] > one[-1]
    others = {
        "devices": train(forks, tmp_path / "devices.json", devices=devices),
        "processes": train(
            forks, tmp_path / "processes.json", "--method", "ring", "--data", "1", devices=devices, processes=processes
        ),
    }
    for where, losses in others.items():
        np.testing.assert_allclose(losses, one, rtol=0, atol=TOLERANCE, err_msg=where)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="processes of a CPU")
def test_a_process_that_fails_ends_the_others():
    """Because it raises an error, or dies: at the same time, as both times the other process waits for a while."""
    started = [
        start_program("failing_jax_rank", str(process), port, how)
        for how, port in (("raises", str(free_port())), ("dies", str(free_port())))
        for process in range(2)
    ]
    ended = finish(*started)
    assert [lines for _, lines, _ in ended] == [["once"]] * 4
    assert all(code != 0 for code, _, _ in ended)
    assert "heads_k_stride: expected a divisor of the 2 KV heads, got 3" in ended[1].errors
