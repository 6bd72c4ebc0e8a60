"""How JAX launches the kernels for Hopper: parameters, scratch memory, sums to add to, transforms and exports."""

import math
import types
import zlib

import jax
import jax.numpy as jnp
import jaxlib
import pytest
import triton
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.support.problems import hopper_problem as problem
from tests.support.problems import launches_of
from zigzag_jax import launch as jax_launch
from zigzag_jax import launch_gluon
from zigzag_kernels import plan
from zigzag_kernels.hopper import rules
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import Operation
from zigzag_kernels.segments.columns import SEGMENT_FIELDS, SEQUENCE_FIELDS


@pytest.fixture(autouse=True)
def _unforced(monkeypatch):
    """The kernels are taken by their rules, also where a run forces or forbids them for all other tests."""
    monkeypatch.delenv(HOPPER.variable, raising=False)


def test_which_jax_can_launch_them(monkeypatch):
    for version, can in (((0, 10, 0), False), ((0, 10, 1), True), ((0, 11, 2), True)):
        monkeypatch.setattr(jax, "__version_info__", version)
        assert jax_launch.can_launch_gluon("triton") == can
        assert not jax_launch.can_launch_gluon("interpret")


class Recorder(types.SimpleNamespace):
    """Stands for `jaxlib.gpu_triton`: writes down in plain text what a kernel call is made of."""

    def __init__(self):
        super().__init__(
            create_array_parameter=lambda zeroed, aligned: f"array({zeroed}, {aligned})",
            create_scalar_parameter=lambda value, kind: f"{kind}({value})",
            TritonKernel=lambda *arguments: arguments,
            TritonKernelCall=lambda *arguments: types.SimpleNamespace(
                to_proto=lambda name, _: repr((name, *arguments)).encode()
            ),
        )


@pytest.fixture
def recorded(monkeypatch):
    """The forward launches, whole and accumulating, of a problem; nothing is compiled."""
    metadata = types.SimpleNamespace(
        name="forward", num_warps=12, shared=1000, global_scratch_size=256, global_scratch_align=128
    )
    monkeypatch.setattr(triton, "__version__", rules.TRITON[0] + "0")
    monkeypatch.setattr(jaxlib, "gpu_triton", Recorder(), raising=False)
    compiled = types.SimpleNamespace(metadata=metadata, asm={"ptx": "ptx"})
    monkeypatch.setattr(launch_gluon, "compile_kernel", lambda *_: compiled)
    parts = plan.WHOLE, plan.Part(accumulate=True, dtype="float32")
    return metadata, [launches_of(problem(tokens=512, world_size=4), Operation.FORWARD, part)[0] for part in parts]


def shapes(tokens=512, ranks=4):
    """Of q, k, v, sinks, where a call without them gives q, and the segment table."""
    q, kv = ((tokens, 32, 128), "bfloat16"), ((ranks * tokens, 8, 128), "bfloat16")
    return [jax.ShapeDtypeStruct(*array) for array in (q, kv, kv, q, ((3, SEGMENT_FIELDS), "int32"))]


def lowered(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_jax_gives_the_kernel_its_scratch_memory_last(recorded):
    _, (whole, accumulating) = recorded
    text = lowered(lambda *arrays: jax_launch.run(whole, *arrays, None, None), *shapes())
    programs = math.prod(whole.grid)
    assert whole.scratch == 256
    assert f"@{launch_gluon.CUSTOM_CALL}" in text
    assert f"tensor<{256 * programs}xi8>" in text
    assert "output_operand_alias<" not in text
    call = launch_gluon.kernel_call(whole, (*shapes(), jnp.zeros(1, jnp.bfloat16), jnp.zeros(1)))
    assert zlib.decompress(call).decode() == repr(
        (
            "forward", ("forward", 12, 1, 1000, "ptx", "", 90), *whole.grid,
            7 * ["array(0, 16)"] + ["i32(3)", "i32(512)", "i32(512)", "i32(0)"] + 2 * ["array(0, 16)"]
            + ["array(0, 128)"],
        )
    )  # fmt: skip
    into = [jax.ShapeDtypeStruct(output.shape, output.dtype) for output in accumulating.outputs]
    text = lowered(lambda *arrays: jax_launch.run(accumulating, *arrays), *shapes(), *into)
    assert "output_tuple_indices = [0], operand_index = 5" in text
    assert "output_tuple_indices = [1], operand_index = 6" in text


def test_jax_gives_the_fused_backward_the_sums_to_add_to(recorded):
    asked = problem(tokens=512, world_size=4, deterministic=False)
    clear, fused, _ = launches_of(asked, Operation.FUSED_BACKWARD)
    q, k, v, *_ = shapes()
    rows, sequences = (jax.ShapeDtypeStruct(*x) for x in (((8, 2048), "float32"), ((2, SEQUENCE_FIELDS), "int32")))
    (sums,) = (jax.ShapeDtypeStruct(output.shape, output.dtype) for output in clear.outputs)
    arguments = q, k, v, q, rows, rows, sequences, sums

    def run(*arrays):
        *arrays, sums = arrays
        return jax_launch.run(fused, *arrays, None, None, sums)

    text = lowered(run, *arguments)
    assert f"tensor<{384 * math.prod(fused.grid)}xi8>" in text
    assert text.count("output_operand_alias<") == 1
    assert "output_tuple_indices = [2], operand_index = 9" in text


def test_jax_transforms_and_exports_them(recorded):
    _, (whole, _) = recorded

    def run(*arrays):
        return jax_launch.run(whole, *arrays, None, None)

    *arrays, segments = shapes()
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in arrays]
    assert f"@{launch_gluon.CUSTOM_CALL}" in lowered(jax.vmap(run, (0, 0, 0, 0, None)), *stacked, segments)
    exported = jax.export.export(
        jax.jit(run), platforms=["cuda"], disabled_checks=jax_launch.export_disabled_checks()
    )(*arrays, segments)  # fmt: skip
    assert f"@{launch_gluon.CUSTOM_CALL}" in exported.mlir_module()
    mesh = Mesh(jax.devices()[:1], ("cp",))
    specs = {"mesh": mesh, "in_specs": (P("cp"), P(), P(), P("cp"), P()), "out_specs": (P("cp"), P(None, "cp"))}
    assert f"@{launch_gluon.CUSTOM_CALL}" in lowered(jax.shard_map(run, **specs), *arrays, segments)


def test_a_kernel_that_wants_more_memory_than_it_gets_is_refused(recorded):
    metadata, (whole, _) = recorded
    metadata.global_scratch_size = 384
    with pytest.raises(RuntimeError, match="expected at most 256 bytes of scratch memory at multiples of 128, got 384"):
        launch_gluon.kernel_call(whole, tuple(shapes()))
