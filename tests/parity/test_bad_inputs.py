"""Every argument of every public function, given what it is not: an error that names an argument, or NaN, or -1."""

import inspect
import re

import jax
import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

import zigzag_jax
import zigzag_torch
from tests.support.bad_calls import FUNCTIONS, NOT_READ, Torch, bad_values, good_arguments

OURS = (ValueError, TypeError, NotImplementedError, RuntimeError)


def poison(result):
    """Whether there is nothing in `result` but NaN, -1 or what stands for it in unsigned integers."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(result) if hasattr(x, "shape")]
    return bool(leaves) and all(np.isnan(x).all() if x.dtype.kind == "f" else (x == -1).all() for x in leaves)


def names_an_argument(message, function, argument):
    """Whether a message begins with an argument, as `name: expected ...`: the bad one, or one that it contradicts."""
    found = re.match(r"(?:rank \d+: )?(\w+)(?:\[\d+\])?: ", message)
    names = {*inspect.signature(function).parameters, "head_dim", "q", "k", "v"}  # the last are parts of qkv
    return (found is not None and (found[1] in names or found[1] == argument)) or re.match(
        rf"{function.__name__}\(\) .*'{argument}'", message
    )


def wrong_outcome(function, arguments, argument, value):
    """Return what is wrong with the answer to a bad value in words, or None."""
    try:
        result = function(**arguments | {argument: value})
    except OURS as error:
        message = str(error)
        return (
            None
            if names_an_argument(message, function, argument)
            else f"unclear {type(error).__name__}: {message[:150]}"
        )
    except Exception as error:
        return f"not ours: {type(error).__name__}: {str(error)[:150]}"
    if isinstance(result, zigzag_torch.Batch | zigzag_jax.Batch):
        not_read = argument in ("cu_seqlens", "lengths")
        return None if (np.asarray(result.cu_seqlens) < 0).any() or not_read else "a batch"
    if argument in NOT_READ.get(function.__name__, ()) and torch.equal(result[0], function(**arguments)[0]):
        return None
    return None if poison(result) else f"taken: {str(result)[:80]}"


@pytest.mark.parametrize(("framework", "name", "arguments"), FUNCTIONS, ids=lambda x: getattr(x, "__name__", None))
def test_what_an_argument_is_not(framework, name, arguments):
    function = getattr(framework.package, name)
    good = good_arguments(framework, name, arguments)
    function(**good)
    wrong = {}
    for argument, (kind, _) in arguments.items():
        if kind == "ignored":
            continue
        for key, value in bad_values(framework, name, argument, kind).items():
            outcome = wrong_outcome(function, good, argument, value)
            if outcome is not None:
                wrong[argument, key] = outcome
    assert not wrong, "\n".join(f"{'/'.join(key)}: {text}" for key, text in wrong.items())


@pytest.fixture
def mesh_of_two():
    """A mesh of two processes of which there is one."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


TENSORS = "array", "rows", "packed rows", "optional array", "offsets", "packed offsets", "real lengths", "int32"
"""Kinds of arguments that are tensors."""


@pytest.mark.parametrize(("name", "arguments"), [case[1:] for case in FUNCTIONS if case[0] is Torch])
def test_tensors_of_other_kinds_are_told_what_to_call(name, arguments, mesh_of_two):
    function, good = getattr(zigzag_torch, name), good_arguments(Torch, name, arguments)
    for argument, (kind, _) in arguments.items():
        if kind not in TENSORS:
            continue
        spread = DTensor.from_local(good[argument], mesh_of_two, [Replicate()])
        with pytest.raises(ValueError, match=rf"^{argument}: .* got a DTensor: call \.to_local\(\)"):
            function(**good | {argument: spread})
        jagged = torch.nested.nested_tensor([good[argument]] * 2, layout=torch.jagged)
        with pytest.raises(ValueError, match=rf"^{argument}: .* pass x\.values\(\), and x\.offsets\(\) as cu_seqlens"):
            function(**good | {argument: jagged})


def test_every_public_function_is_called():
    called = {(framework.package, name) for framework, name, _ in FUNCTIONS}
    for package in (zigzag_torch, zigzag_jax):
        public = {name for name in package.__all__ if callable(getattr(package, name))}
        assert public - {name for of, name in called if of is package} <= {
            "Batch",  # what `prepare_batch` makes
            "DocumentPlan",  # what `plan_documents` makes
            "SegmentedBatch",  # what `prepare_segments` makes
            "ShardedBatch",  # what `shard_documents` makes
            "export_disabled_checks",  # without arguments
            "patch_ring_flash_attn",  # without arguments
        }


def test_there_are_thousands_of_calls():
    calls = 0
    for framework, name, arguments in FUNCTIONS:
        for argument, (kind, _) in arguments.items():
            if kind != "ignored":
                values = bad_values(framework, name, argument, kind)
                assert len(values) >= 20, (name, argument)
                calls += len(values)
    assert calls >= 3000
