"""The flags, what they switch, and what the profile says."""

import jax
import pytest
import torch

import zigzag_jax
from tests.support.machine import GPU
from zigzag_torch import ZigzagConfig, profile_report, profiling, zigzag_attention
from zigzag_torch.compat import flags

DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def _no_flags_from_outside(monkeypatch):
    for variable in flags.DEFAULTS:
        monkeypatch.delenv(variable, raising=False)


def test_flags_are_read_at_call_time(monkeypatch):
    assert ZigzagConfig() == ZigzagConfig(use_fused_triton_v2=True, verify_correctness=False, profile_kernels=False)
    for name, variable in flags.VARIABLES.items():
        for value in ("1", "0"):
            monkeypatch.setenv(variable, value)
            assert flags.enabled(name) is (value == "1")
        monkeypatch.setenv(variable, "yes")
        with pytest.raises(ValueError, match=f"{variable}: expected 0 or 1, got 'yes'"):
            flags.enabled(name)


def test_a_config_wins_over_the_environment_while_it_is_in_force(monkeypatch):
    monkeypatch.setenv("ZIGZAG_VERIFY_CORRECTNESS", "1")
    config = ZigzagConfig(use_fused_triton_v2=False)
    with config:
        assert not flags.enabled("use_fused_triton_v2")
        assert flags.enabled("verify_correctness")
        with ZigzagConfig(verify_correctness=False):
            assert not flags.enabled("verify_correctness")
            with config:
                assert flags.enabled("verify_correctness")
        assert flags.enabled("verify_correctness")
    assert flags.enabled("use_fused_triton_v2")
    with pytest.raises(ValueError, match="profile_kernels: expected True or False, got 1"):
        ZigzagConfig(profile_kernels=1)


def test_the_published_names_of_flags_are_those_in_force(monkeypatch):
    for name, variable in flags.VARIABLES.items():
        published = variable.removeprefix("ZIGZAG_")
        for value in ("1", "0"):
            monkeypatch.setenv(variable, value)
            assert getattr(ZigzagConfig, published) is (value == "1")
            with ZigzagConfig(**{name: value == "0"}):
                assert getattr(ZigzagConfig, published) is (value == "0")
        with pytest.raises(AttributeError, match=f"ZigzagConfig.{published} is read-only: .* {variable}, or .*{name}="):
            setattr(ZigzagConfig, published, True)


def test_the_profile_names_and_times_launches(capsys):
    def launch(name):
        with profiling.region(name, DEVICE):
            torch.ones(8, device=DEVICE).cumsum(0)

    profile_report(reset=True)
    capsys.readouterr()
    launch("unseen")
    with ZigzagConfig(profile_kernels=True), torch.profiler.profile(acc_events=True) as profile:
        for name in ("attention_forward", "attention_forward", "backward_dq"):
            launch(name)
    counts = {event.key: event.count for event in profile.key_averages()}  # a GPU has its own entry for each range
    assert counts["zigzag::attention_forward"] == 2 * counts["zigzag::backward_dq"] > 0
    assert "zigzag::unseen" not in counts
    profile_report(reset=True)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["kernel", "calls", "total", "ms", "median", "ms"]
    calls = {name: (int(calls), float(total), float(median)) for name, calls, total, median in map(str.split, rows)}
    assert calls.keys() == {"attention_forward", "backward_dq"}
    assert calls["attention_forward"][0] == 2
    assert 0 < calls["attention_forward"][2] < calls["attention_forward"][1]
    profile_report()
    assert len(capsys.readouterr().out.splitlines()) == 1


KERNELS = {"build_segments", "attention_forward", "backward_delta", "backward_dkdv", "backward_dq"}


def test_every_launch_has_a_name_and_a_time(kernel_backend, capsys):
    q, k, v = (torch.randn(8, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    profile_report(reset=True)
    capsys.readouterr()
    with ZigzagConfig(profile_kernels=True), torch.profiler.profile(acc_events=True) as profile:
        zigzag_attention(q, k, v, backend=kernel_backend).sum().backward()
    seen = {event.key.removeprefix("zigzag::") for event in profile.key_averages()}
    assert seen >= KERNELS
    profile_report(reset=True)
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == KERNELS


def test_every_launch_has_a_name_in_jax(kernel_backend):
    """In the program itself, which is what JAX's profiler and nsys read names from."""

    def loss(q):
        return zigzag_jax.zigzag_attention(q, q, q, backend=kernel_backend).sum()

    text = jax.jit(jax.grad(loss)).lower(jax.numpy.ones((8, 1, 16))).as_text(debug_info=True)
    assert all(f"zigzag::{kernel}" in text for kernel in KERNELS)
