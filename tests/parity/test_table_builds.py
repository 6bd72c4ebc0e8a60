"""Layers that share a prepared batch share its device tables, and the comparison of its lengths between ranks."""

import contextlib
import functools
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.distributed as dist
from jax.sharding import PartitionSpec as P

import zigzag_jax
import zigzag_torch
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from tests.support.spread import METHODS, mesh_of
from zigzag_kernels import interpreter

pytestmark = pytest.mark.skipif(GPU, reason="counts what is interpreted")
LAYERS, WORLD_SIZE, TOKENS, CU_SEQLENS = 4, 2, 8, [0, 4, 16]


@contextlib.contextmanager
def table_builds():
    """The launches that build tables, of either front end, in a list that fills as they run."""
    run, built = interpreter.interpret, []

    def recorded(launch, inputs, outputs):
        if launch.outputs[0].name == "segments":
            built.append(launch)
        run(launch, inputs, outputs)

    with mock.patch.object(interpreter, "interpret", recorded):
        yield built


@contextlib.contextmanager
def comparisons():
    """What this process reduces over all ranks, in a list that fills as it does."""
    reduce, reduced = dist.ProcessGroup.allreduce, []

    def recorded(group, *arguments):
        reduced.append(arguments)
        return reduce(group, *arguments)

    with mock.patch.object(dist.ProcessGroup, "allreduce", recorded):
        yield reduced


def torch_layers(attend, prepare, x, cu_seqlens):
    """A model of `LAYERS` layers, which share what `prepare` makes of the lengths."""
    batch = prepare(cu_seqlens)
    for _ in range(LAYERS):
        x = attend(x, x, x, batch)
    return x


def torch_step(*arguments):
    torch_layers(*arguments).sum().backward()


def assert_one_build_for_all_layers(attend, prepare, cu_seqlens, *steps):
    for step in steps:
        with table_builds() as built:
            step(attend, prepare, torch.randn(TOKENS, 1, 16, requires_grad=True), cu_seqlens)
        assert len(built) == 1, step


def test_layers_of_torch_on_one_device_build_the_tables_once():
    options, cu_seqlens = {"backend": "interpret"}, torch.tensor([0, 3, TOKENS], dtype=torch.int32)
    attend = functools.partial(zigzag_torch.zigzag_attention, **options)
    prepare = functools.partial(zigzag_torch.prepare_batch, **options)
    compiled = torch.compile(torch_layers, backend="aot_eager")
    assert_one_build_for_all_layers(attend, prepare, cu_seqlens, torch_step, compiled)
    with table_builds() as built:
        torch_layers(attend, lambda x: x, torch.randn(TOKENS, 1, 16), cu_seqlens)
    assert len(built) == LAYERS


def check_builds(rank, world_size):
    warnings.simplefilter("ignore")  # dynamo's own
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    for method in METHODS:
        options = {"group": dist.group.WORLD, "method": method, "backend": "interpret"}
        attend = functools.partial(zigzag_torch.zigzag_attention, **options)
        prepare = functools.partial(zigzag_torch.prepare_batch, **options)
        with comparisons() as compared:
            assert_one_build_for_all_layers(attend, prepare, cu_seqlens, torch_layers)
        assert len(compared) == 1, method
        assert_one_build_for_all_layers(attend, prepare, cu_seqlens, torch.compile(torch_layers, backend="aot_eager"))


@pytest.mark.slow
def test_layers_of_torch_between_ranks_build_the_tables_and_compare_lengths_once(tmp_path):
    run_ranks(WORLD_SIZE, tmp_path, check_builds)


def jax_layers(x, lengths, **options):
    batch = zigzag_jax.prepare_batch(lengths, **options)
    for _ in range(LAYERS):
        x = zigzag_jax.zigzag_attention(x, x, x, batch, **options)
    return x


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_of_jax_on_one_device_build_the_tables_once(compiled):
    def step(x, lengths):
        return jax.grad(lambda x: jax_layers(x, lengths, backend="interpret").sum())(x)

    with table_builds() as built:
        called = jax.jit(step) if compiled else step
        jax.block_until_ready(called(jnp.ones((TOKENS, 1, 16)), jnp.array([0, 3, TOKENS], jnp.int32)))
    assert len(built) == 1


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_jax_between_devices_build_the_tables_once_on_each(method):
    def step(x, lengths):
        options = {"axis_name": "cp", "method": method, "backend": "interpret"}
        return jax.grad(lambda x: jax_layers(x, lengths, **options).sum())(x)

    spread = jax.shard_map(step, mesh=mesh_of(WORLD_SIZE), in_specs=(P("cp"), P()), out_specs=P("cp"))
    with table_builds() as built:
        jax.block_until_ready(jax.jit(spread)(jnp.ones((WORLD_SIZE * TOKENS, 1, 16)), np.array(CU_SEQLENS, np.int32)))
    assert len(built) == WORLD_SIZE
