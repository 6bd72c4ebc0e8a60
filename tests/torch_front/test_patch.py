"""The patch of the published ring_flash_attn package: the real one, with stand-ins for what it needs besides torch."""

import importlib.util
import inspect
import sys
import types
from unittest import mock

import pytest
import torch

import zigzag_torch
from tests.support import oracle, stand_ins
from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.machine import GPU
from tests.support.processes import run_ranks, torch_numpy
from tests.support.rank import assert_results_close, rank_arrays, rank_results
from zigzag_torch import ZigzagConfig, patch_ring_flash_attn
from zigzag_torch.compat import ring_flash_attn as patching

LENGTHS, HEAD_DIM = (8, 0, 16), 16  # of the sequences on every rank


def attention_calls(package, rank, world_size):
    """All functions that are replaced, called as their package says; names and results with gradients.

    In float16: its ring adds up gradients in place of what it adds if they are float32. On one rank it would send to
    itself, which gloo does not do: there without the ring.
    """
    generator = torch.Generator().manual_seed(rank)
    local = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    *lengths, k_slice = package.llama3_flash_attn_prepare_cu_seqlens(local * world_size, True, rank, world_size)
    arguments = {"llama3_flash_attn_varlen": (*lengths, 1, k_slice)}
    if world_size > 1:
        arguments |= {"zigzag_ring_flash_attn_varlen": (local, max(LENGTHS)), "zigzag_ring_flash_attn": ()}
    results = {}
    for name, lengths in arguments.items():
        shapes = ((sum(LENGTHS), heads, HEAD_DIM) for heads in (4, 2, 2))
        q, k, v = (torch.randn(shape, generator=generator).half() for shape in shapes)
        if not lengths:
            q, k, v = (x.unflatten(0, (3, -1)) for x in (q, k, v))
        packed = {
            "func": (q, k, v),
            "kvpacked_func": (q, torch.stack([k, v], -3)),
            "qkvpacked_func": (torch.stack([k, v, k + v], -3),),
        }
        for form, tensors in packed.items():
            leaves = [x.clone().requires_grad_() for x in tensors]
            function = getattr(package, f"{name}_{form}")
            out, lse, _ = function(*leaves, *lengths, causal=True, return_attn_probs=True)
            assert function(*leaves, *lengths, causal=True).equal(out)
            dout = torch.randn(out.shape, generator=generator).half()
            results[f"{name}_{form}"] = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
    return results


def check_patch(rank, world_size):
    """The package itself, patched, patched with its functions chosen by flag, and after the patch is undone."""
    stand_ins.install()
    import ring_flash_attn

    own = attention_calls(ring_flash_attn, rank, world_size)
    assert len(own) == (3 if world_size == 1 else 9)
    with mock.patch.object(patching, "zigzag_attention", wraps=zigzag_torch.zigzag_attention) as fused:
        with ZigzagConfig(verify_correctness=True), patch_ring_flash_attn():
            patched = attention_calls(ring_flash_attn, rank, world_size)
        calls = 2 * (3 if world_size == 1 else 6)  # the contiguous layout agrees on one rank only
        assert fused.call_count == calls
        patch = patch_ring_flash_attn()
        with pytest.raises(RuntimeError, match="is patched already"):
            patch_ring_flash_attn()
        with ZigzagConfig(use_fused_triton_v2=False):
            by_flag = attention_calls(ring_flash_attn, rank, world_size)
        q, cu_seqlens = torch.zeros(4, 2, HEAD_DIM), torch.tensor([0, 4], dtype=torch.int32)
        with pytest.raises(NotImplementedError, match="dropout_p"):
            ring_flash_attn.zigzag_ring_flash_attn_varlen_func(q, q, q, cu_seqlens, 4, dropout_p=0.1, causal=True)
        patch.undo()
        patch.undo()
        undone = attention_calls(ring_flash_attn, rank, world_size)
        assert fused.call_count == calls
    for name, expected in own.items():
        for ours, theirs in zip(patched[name], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2, msg=lambda m, name=name: f"{name}: {m}")
        for results in (by_flag, undone):
            assert all(torch.equal(a, b) for a, b in zip(results[name], expected, strict=True)), name


@pytest.mark.skipif(importlib.util.find_spec("ring_flash_attn") is None, reason="needs the package ring-flash-attn")
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_patched_package_gives_the_same(world_size, tmp_path):
    run_ranks(world_size, tmp_path, check_patch)


FORK = {name: (function, f"{parameters} n_chunks") for name, (function, parameters) in patching.FORK.items()}


def fake_package(monkeypatch, fork=FORK, **changed):
    """Modules with functions of the right parameters, but for those `changed`; with those of the `fork` too."""
    for module_name, (function_name, parameters) in (patching.REPLACED | fork).items():
        names = changed.get(module_name, parameters)

        def forward(*_):
            pass

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names.split()]
        forward.__signature__ = inspect.Signature(parameters)
        module = types.ModuleType(f"ring_flash_attn.{module_name}")
        setattr(module, function_name, types.SimpleNamespace(forward=forward))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "ring_flash_attn", types.ModuleType("ring_flash_attn"))


@pytest.mark.parametrize(
    ("causal", "softmax_scale", "window_size"),
    [
        (True, None, (-1, -1)),
        (False, None, (-1, -1)),
        (True, 0.4, (-1, -1)),
        (True, None, (3, 0)),
        (False, 0.4, (2, 1)),
    ],
)
@pytest.mark.parametrize("name", patching.REPLACED | FORK)
def test_mask_and_scale_of_the_package_are_those_of_the_fused_path(
    name, causal, softmax_scale, window_size, monkeypatch
):
    """Its functions hand these on by position; on one device, which needs no group."""
    fake_package(monkeypatch)
    case = Case(
        name=name, world_size=1, lengths=(8, 8), heads=4, kv_heads=2, causal=causal, softmax_scale=softmax_scale,
        window_size=window_size,
    )  # fmt: skip
    inputs = make_inputs(case)
    *arrays, dlse = map(torch.tensor, rank_arrays(case, inputs, 0))
    leaves, dout = [x.requires_grad_() for x in arrays[:3]], arrays[3]
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    lengths = {
        "zigzag_ring_flash_attn_varlen": (cu_seqlens, 8),
        "zigzag_ring_flash_attn": (),
        "llama3_flash_attn_varlen": (cu_seqlens, cu_seqlens, 8, 8, 1, slice(0, 16)),
        "zigzag_llama3_flash_attn_varlen": (cu_seqlens, cu_seqlens, 8, 8, 1, slice(0, 16)),
    }[name]
    given = leaves if lengths else [x.unflatten(0, (2, 8)) for x in leaves]
    options = 0.0, softmax_scale, causal, window_size, None, False, True, None, *[2] * (name in FORK)
    with patch_ring_flash_attn():
        function = getattr(sys.modules[f"ring_flash_attn.{name}"], (patching.REPLACED | FORK)[name][0])
        out, lse, _ = function.apply(*given, *lengths, *options)
        if window_size != (-1, -1):
            with (
                ZigzagConfig(use_fused_triton_v2=False),
                pytest.raises(NotImplementedError, match="window_size: only the fused path computes windows"),
            ):
                function.apply(*given, *lengths, *options)
    if not lengths:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    results = out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))
    named = {result: torch_numpy(x) for result, x in zip(RESULTS, results, strict=True)}
    arithmetics = oracle.EXACT, oracle.straightforward(case.dtype)
    assert_results_close(name, named, *(rank_results(case, inputs, 0, x) for x in arithmetics))


def test_lengths_of_keys_that_contradict_those_of_rows_give_nan(monkeypatch):
    fake_package(monkeypatch)
    q, rows, keys = torch.ones(8, 1, HEAD_DIM), *(torch.tensor([0, n, 8], dtype=torch.int32) for n in (4, 6))
    options = 0.0, None, True, (-1, -1), None, False, False, None
    with patch_ring_flash_attn():
        function = sys.modules["ring_flash_attn.llama3_flash_attn_varlen"].Llama3FlashAttnVarlenFunc
        assert function.apply(q, q, q, rows, rows, 4, 4, 1, slice(0, 8), *options).isfinite().all()
        assert function.apply(q, q, q, rows, keys, 6, 6, 1, slice(0, 8), *options).isnan().all()


def test_a_changed_package_is_left_alone(monkeypatch):
    fake_package(monkeypatch, llama3_flash_attn_varlen="ctx q k v cu_seqlens")
    before = {name: dict(vars(sys.modules[f"ring_flash_attn.{name}"])) for name in patching.REPLACED}
    with pytest.raises(RuntimeError, match=r"expected llama3_flash_attn_varlen\.Llama3.* got ctx q k v cu_seqlens$"):
        patch_ring_flash_attn()
    assert before == {name: vars(sys.modules[f"ring_flash_attn.{name}"]) for name in patching.REPLACED}
    monkeypatch.delattr(sys.modules["ring_flash_attn.zigzag_ring_flash_attn"], "ZigZagRingFlashAttnFunc")
    with pytest.raises(RuntimeError, match="got no such function"):
        patch_ring_flash_attn()


def check_fork(rank, world_size):
    """The function that only the fork has is fused on any number of ranks: its layout is ours."""
    local = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    q, k, v = torch.randn(3, sum(LENGTHS), 2, HEAD_DIM).unbind()
    lengths = local, world_size * local, 16, 16 * world_size, 1, slice(0, 24)
    options = 0.0, None, True, (-1, -1), None, False, False, None, 2
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_package(monkeypatch)
        with patch_ring_flash_attn():
            (name,) = FORK
            function = getattr(sys.modules[f"ring_flash_attn.{name}"], FORK[name][0])
            out = function.apply(q, k, v, *lengths, *options)
    assert out.equal(zigzag_torch.zigzag_llama3_flash_attn_varlen_func(q, k, v, *lengths, causal=True))


@pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
def test_the_function_of_the_fork_is_fused_between_ranks(tmp_path):
    run_ranks(2, tmp_path, check_fork)


def test_the_package_needs_no_fork_and_a_changed_fork_is_left_alone(monkeypatch):
    fake_package(monkeypatch, fork={})
    monkeypatch.delitem(sys.modules, f"ring_flash_attn.{next(iter(FORK))}", raising=False)
    patch_ring_flash_attn().undo()
    fake_package(monkeypatch, zigzag_llama3_flash_attn_varlen="ctx q k v group")
    with pytest.raises(RuntimeError, match=r"expected zigzag_llama3_flash_attn_varlen\.Zigzag.* got ctx q k v group$"):
        patch_ring_flash_attn()


def test_a_package_that_failed_to_import_is_not_patched_the_second_time(monkeypatch):
    """Of a failed import Python keeps the modules inside of the package that were imported before the failure."""
    fake_package(monkeypatch)
    monkeypatch.setitem(sys.modules, "ring_flash_attn", None)
    before = {name: dict(vars(sys.modules[f"ring_flash_attn.{name}"])) for name in patching.REPLACED}
    for _ in range(2):
        with pytest.raises(ImportError, match=r"expected ring_flash_attn 0\.1\.8, which failed"):
            patch_ring_flash_attn()
    assert before == {name: vars(sys.modules[f"ring_flash_attn.{name}"]) for name in patching.REPLACED}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ring_flash_attn", None)
    with pytest.raises(ImportError, match=r"expected ring_flash_attn 0\.1\.8, which failed"):
        patch_ring_flash_attn()
