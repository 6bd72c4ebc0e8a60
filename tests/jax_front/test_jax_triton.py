"""Launches through jax-triton: its two signatures, played by stand-ins that run the kernels in the interpreter.

A GPU runs one of the two, whichever is installed.
"""

import dataclasses
import inspect
import types
import warnings

import jax
import numpy as np
import pytest

from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.machine import GPU
from tests.support.parts import FRAMEWORKS, Rank
from tests.support.rank import gathered_rows
from zigzag_jax import launch
from zigzag_jax.interpret import HostTensor
from zigzag_kernels.interpreter import interpret

CASE = Case(name="jax-triton", world_size=2, lengths=(12, 20), heads=4, kv_heads=2, padding=1)


def call_03(
    *args, kernel, out_shape, grid, num_warps=None, num_stages=None, input_output_aliases=None, **metaparams
):  # fmt: skip
    """`jax_triton.triton_call` of 0.3: the kernel gets the operands, then every output.

    `input_output_aliases` counts arrays only; the kernel gets their memory twice.
    """
    arrays = [i for i, x in enumerate(args) if hasattr(x, "shape")]
    aliases = {arrays[i]: output for i, output in (input_output_aliases or {}).items()}
    return execute(kernel, grid, args, range(len(out_shape)), out_shape, aliases, metaparams)


def call_04(
    *args, kernel, out_type=None, grid, num_warps=None, num_stages=None, input_output_aliases=None, **kwargs
):  # fmt: skip
    """`jax_triton.triton_call` of 0.4: parameters of the kernel that are not given are the outputs without alias.

    `input_output_aliases` counts scalars too; the kernel gets their memory once, where the operand is.
    """
    aliases = input_output_aliases or {}
    if aliases:
        warnings.warn("input_output_aliases is deprecated. Pass refs instead", DeprecationWarning, stacklevel=2)
        for i, output in aliases.items():
            assert args[i].shape == out_type[output].shape
            assert sum(x is args[i] for x in args) == 1, "an operand that is read elsewhere is copied first"
    missing = [name for name in inspect.signature(kernel.fn).parameters if name not in kwargs][len(args) :]
    fresh = [i for i in range(len(out_type)) if i not in aliases.values()]
    assert len(missing) == len(fresh), f"out_type has {len(fresh)} unaliased outputs, {missing} are missing"
    return execute(kernel, grid, args, fresh, out_type, aliases, kwargs)


def execute(kernel, grid, operands, behind, outputs, aliases, constexprs):
    """Run `kernel` on `operands` and, behind them, the outputs of these numbers; `aliases` says which share memory."""
    given = {i: x for i, x in enumerate(operands) if hasattr(x, "shape")}

    def on_host(*arrays):
        results = [np.full(output.shape, -1, output.dtype) for output in outputs]
        memory = {i: np.ascontiguousarray(x) for i, x in zip(given, arrays, strict=True)}
        for i, output in aliases.items():
            memory[i] = results[output] = memory[i].copy()
        places = [HostTensor(memory[i]) if i in memory else x for i, x in enumerate(operands)]
        places += [HostTensor(results[output]) for output in behind]
        made = types.SimpleNamespace(kernel=kernel, grid=grid, scalars={}, constexprs=constexprs)
        interpret(made, places, [])
        return tuple(results)

    return jax.pure_callback(on_host, tuple(outputs), *given.values())


@pytest.mark.skipif(GPU, reason="nothing interprets here")
@pytest.mark.parametrize("stand_in", [call_03, call_04], ids=["0.3", "0.4"])
@pytest.mark.parametrize("way", ["windows", "ring"])
def test_each_signature_gives_the_bits_of_the_interpreter(stand_in, way, monkeypatch):
    """Results that begin empty, those that are written in place, and those that are added to."""
    called = []

    def noted(*args, **kwargs):
        called.append(bool(kwargs["input_output_aliases"]))
        return stand_in(*args, **kwargs)

    noted.__signature__ = inspect.signature(stand_in)
    monkeypatch.setattr(launch, "import_jax_triton", lambda: types.SimpleNamespace(triton_call=noted))

    def compiled(made, *arrays):
        return launch.run(dataclasses.replace(made, target="9.0"), *arrays)

    framework = FRAMEWORKS["jax"]
    results, expected = (
        results_of(Rank(CASE, make_inputs(CASE), 1, dataclasses.replace(framework, run=run)), way)
        for run in (compiled, framework.run)
    )
    for name in RESULTS:
        np.testing.assert_array_equal(results[name], expected[name], name)
    assert set(called) == {False, True}


def results_of(player, way):
    return player.ring() if way == "ring" else player.windows(gathered_rows(CASE))
