"""The flags, what they switch, and what the profile says."""

import jax
import pytest
import torch

import zigzag_jax
from tests.support.machine import GPU
from zigzag_torch import ZigzagConfig, profile_report, profiling, zigzag_attention
from zigzag_torch.compat import flags, verify

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


def double(x):
    return x * 2, x.sum()


def slightly_more(x):
    return x * 2.1, x.sum()


def cube(x):
    return x.square(), x.pow(3).sum()


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dout):
        return dout * 2.1


def test_verification_compares_both_directions():
    x = torch.rand(3, 4, device=DEVICE) + 1
    x.requires_grad_()
    with ZigzagConfig(verify_correctness=True):
        out, total = verify.choose_path(double, double, x)
        (dx,) = torch.autograd.grad((out, total), x, (torch.ones_like(out), torch.ones_like(total)))
        assert torch.equal(dx, torch.full_like(x, 3))
        out, total = verify.choose_path(cube, cube, x)
        twice = [torch.autograd.grad(total, x, retain_graph=True) for _ in range(2)]
        for (dx,) in twice:
            torch.testing.assert_close(dx, 3 * x * x)
        with pytest.raises(AssertionError, match=r"results\[0\] of the fused and the unfused path differ"):
            verify.choose_path(double, slightly_more, x)
        out, _ = verify.choose_path(double, lambda x: (WrongBackward.apply(x), x.sum()), x)
        with pytest.raises(AssertionError, match=r"gradients\[0\] .*\n.*\n.*\n.*\nGreatest absolute difference: 0\.09"):
            out.sum().backward()
    assert torch.equal(verify.choose_path(double, slightly_more, x)[0], x * 2)
    with ZigzagConfig(use_fused_triton_v2=False, verify_correctness=True):
        assert torch.equal(verify.choose_path(double, slightly_more, x)[0], x * 2.1)


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
