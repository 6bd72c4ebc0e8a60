"""The kernels for Hopper: when they are taken, that both frameworks launch the same, and what they compute."""

import functools
import math
import subprocess
import sys
import types
import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
import torch
import triton
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import frameworks
import oracle
import zigzag_jax
from cases import BENCH, CASES, RESULTS, Case, make_inputs
from closeness import assert_close
from conftest import GPU
from zigzag_jax import gluon
from zigzag_jax import launch as jax_launch
from zigzag_kernels import config, hopper, plan
from zigzag_kernels.problem import make_problem

HAS_TRITON = triton.__version__.startswith(hopper.TRITON)
HERE = GPU and torch.cuda.get_device_capability() == (9, 0) and HAS_TRITON
SELECTED = [
    case
    for case in CASES
    if case.tags.isdisjoint(BENCH)
    and case.dtype != "float32"
    and hopper.MIN_HEAD_DIM <= case.head_dim <= hopper.MAX_HEAD_DIM
]
# Chunks of no whole block, and padding: boxes of keys run over the ends of chunks, sequences and slots.
UNEVEN = Case(
    name="hopper-w2", world_size=2, lengths=(1004, 4, 1200, 0), heads=4, kv_heads=2, head_dim=128, dtype="bfloat16",
    padding=70,
)  # fmt: skip
PLAIN = replace(UNEVEN, name="hopper-w1", world_size=1, lengths=(503, 1, 600, 0), head_dim=64, dtype="float16")
PORTABLE = ("backward_dkdv", "backward_dq")
DOUT_STRIDES = (4096, 128)
KERNELS = {"attention_forward_hopper", "backward_dkdv_hopper", "backward_dq_hopper"}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs the Triton that these kernels are written for")
needs_hopper = pytest.mark.skipif(not HERE, reason="needs a Hopper GPU too")


@pytest.fixture
def forced(monkeypatch):
    """They are taken wherever they can serve; the names of the attention kernels that were launched."""
    names = set()

    def noted(make_launch):
        def make_and_note(*arguments):
            launch = make_launch(*arguments)
            names.add(launch.kernel.fn.__name__)
            return launch

        return make_and_note

    monkeypatch.setenv(hopper.VARIABLE, "1")
    for name in ("_forward_launch", "_dkdv_launch", "_dq_launch"):
        monkeypatch.setattr(plan, name, noted(getattr(plan, name).__wrapped__))
    frameworks._jax_attention.cache_clear()
    yield names
    frameworks._jax_attention.cache_clear()


def problem(
    tokens=8192, head_dim=128, dtype="bfloat16", stride=None, q_stride=None, target="9.0", gluon=True, sequences=1,
    world_size=8,
):  # fmt: skip
    q = ((tokens, 32, head_dim), dtype, (q_stride or 32 * head_dim, head_dim))
    kv = ((world_size * tokens, 8, head_dim), dtype, (stride or 8 * head_dim, head_dim))
    return make_problem(
        q, kv, kv, sequences=sequences, world_size=world_size, causal=True, softmax_scale=None, target=target,
        gluon=gluon,
    )  # fmt: skip


def test_the_rules_that_take_them(monkeypatch):
    monkeypatch.setattr(triton, "__version__", hopper.TRITON + "0")
    for value in (None, "1"):
        if value:
            monkeypatch.setenv(hopper.VARIABLE, value)
        assert hopper.forward_kernel(problem()) == "hopper_forward"
        assert hopper.backward_kernels(problem(), DOUT_STRIDES) == ("hopper_dkdv", "hopper_dq")
        assert hopper.forward_kernel(problem(tokens=2048)) == "hopper_forward_few"
        assert hopper.backward_kernels(problem(tokens=2048), DOUT_STRIDES) == ("hopper_dkdv", "hopper_dq_few")
        assert hopper.forward_kernel(problem(sequences=64)) == "hopper_forward_short"
        short = hopper.forward_kernel(problem(sequences=64, head_dim=64))
        assert short == ("hopper_forward_short" if value else "forward")
        short = hopper.backward_kernels(problem(sequences=64, head_dim=64), DOUT_STRIDES)
        assert short == (("hopper_dkdv", "hopper_dq_short") if value else PORTABLE)
        medium = hopper.backward_kernels(problem(sequences=16, head_dim=64), DOUT_STRIDES)
        assert medium == ("hopper_dkdv" if value else "backward_dkdv", "hopper_dq")
        assert hopper.backward_kernels(problem(sequences=64), DOUT_STRIDES) == ("hopper_dkdv", "hopper_dq_short")
        # dK/dV alone reads q and dout by the copy engine.
        assert hopper.backward_kernels(problem(), (4100, 128)) == ("backward_dkdv", "hopper_dq")
        assert hopper.backward_kernels(problem(q_stride=4100), DOUT_STRIDES) == ("backward_dkdv", "hopper_dq")
        for cannot in (
            {"head_dim": 32}, {"head_dim": 136}, {"dtype": "float32"}, {"target": "8.0"}, {"target": "10.0"},
            {"gluon": False}, {"stride": 1028},
        ):  # fmt: skip
            assert hopper.forward_kernel(problem(**cannot)) == "forward", cannot
            assert hopper.backward_kernels(problem(**cannot), DOUT_STRIDES) == PORTABLE, cannot
    monkeypatch.setenv(hopper.VARIABLE, "0")
    assert hopper.forward_kernel(problem()) == "forward"
    monkeypatch.setenv(hopper.VARIABLE, "yes")
    with pytest.raises(ValueError, match="ZIGZAG_HOPPER: expected 0 or 1, got 'yes'"):
        hopper.forward_kernel(problem())
    monkeypatch.delenv(hopper.VARIABLE)
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert hopper.forward_kernel(problem()) == "forward"


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
    monkeypatch.setattr(triton, "__version__", hopper.TRITON + "0")
    monkeypatch.setattr(jaxlib, "gpu_triton", Recorder(), raising=False)
    compiled = types.SimpleNamespace(metadata=metadata, asm={"ptx": "ptx"})
    monkeypatch.setattr(gluon, "compile_kernel", lambda *_: compiled)
    parts = plan.WHOLE, plan.Part(accumulate=True, dtype="float32")
    return metadata, [plan._forward_launch.__wrapped__(problem(tokens=512, world_size=4), part) for part in parts]


def shapes(tokens=512, ranks=4):
    arrays = [((tokens, 32, 128), "bfloat16")] + 2 * [((ranks * tokens, 8, 128), "bfloat16")] + [((3, 8), "int32")]
    return [jax.ShapeDtypeStruct(*array) for array in arrays]


def lowered(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_jax_gives_the_kernel_its_scratch_memory_last(recorded):
    _, (whole, accumulating) = recorded
    text = lowered(lambda *arrays: jax_launch.run(whole, *arrays, None, None), *shapes())
    programs = math.prod(whole.grid)
    assert whole.scratch == 256
    assert f"@{gluon.CUSTOM_CALL}" in text
    assert f"tensor<{256 * programs}xi8>" in text
    assert "output_operand_alias<" not in text
    call = gluon._kernel_call(whole, (*shapes(), jnp.zeros(1, jnp.bfloat16), jnp.zeros(1)))
    assert zlib.decompress(call).decode() == repr(
        (
            "forward", ("forward", 12, 1, 1000, "ptx", "", 90), *whole.grid,
            6 * ["array(0, 16)"] + ["i32(3)", "i32(512)", "i32(512)", "i32(0)"] + 2 * ["array(0, 16)"]
            + ["array(0, 128)"],
        )
    )  # fmt: skip
    into = [jax.ShapeDtypeStruct(output.shape, output.dtype) for output in accumulating.outputs]
    text = lowered(lambda *arrays: jax_launch.run(accumulating, *arrays), *shapes(), *into)
    assert "output_tuple_indices = [0], operand_index = 4" in text
    assert "output_tuple_indices = [1], operand_index = 5" in text


def test_jax_transforms_and_exports_them(recorded):
    _, (whole, _) = recorded

    def run(*arrays):
        return jax_launch.run(whole, *arrays, None, None)

    q, k, v, segments = shapes()
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (q, k, v)]
    assert f"@{gluon.CUSTOM_CALL}" in lowered(jax.vmap(run, (0, 0, 0, None)), *stacked, segments)
    exported = jax.export.export(
        jax.jit(run), platforms=["cuda"], disabled_checks=jax_launch.export_disabled_checks()
    )(q, k, v, segments)  # fmt: skip
    assert f"@{gluon.CUSTOM_CALL}" in exported.mlir_module()
    mesh = Mesh(jax.devices()[:1], ("cp",))
    specs = {"mesh": mesh, "in_specs": (P("cp"), P(), P(), P()), "out_specs": (P("cp"), P(None, "cp"))}
    assert f"@{gluon.CUSTOM_CALL}" in lowered(jax.shard_map(run, **specs), q, k, v, segments)


def test_a_kernel_that_wants_more_memory_than_it_gets_is_refused(recorded):
    metadata, (whole, _) = recorded
    metadata.global_scratch_size = 384
    with pytest.raises(RuntimeError, match="expected at most 256 bytes of scratch memory at multiples of 128, got 384"):
        gluon._kernel_call(whole, tuple(shapes()))


COMPILE = """
import os, subprocess, sys, tempfile, triton
from zigzag_jax import gluon
from zigzag_kernels import config, plan
from zigzag_kernels.hopper import forward
sys.path.insert(0, {tests!r})
from test_hopper import problem  # without a GPU it has all that is imported after it interpreted
os.environ.pop("TRITON_INTERPRET", None)
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
SPILLS = {{"hopper_dkdv": 192, "hopper_fused": 64}}  # bytes: at head_dim 64 in the loop of dK/dV, else outside of loops


def launches(asked, part):
    # Each kernel, and those that walk through keys with all their tiles.
    dout = asked.q_strides
    yield plan.forward_kernel(asked), plan._forward_launch(asked, part)
    yield plan.backward_kernels(asked, dout)[1], plan._dq_launch(asked, dout, part)
    if asked.tokens == 8192 and asked.sequences == 1:
        yield "hopper_dkdv", plan._dkdv_launch(asked, dout, part)
        if part == plan.WHOLE:
            yield "hopper_fused", plan._fused_launches(asked, dout)[1]


def pointers(launch, dtype):
    kinds = {{"segments": "int32", "sequences": "int32", "lse": "float32", "delta": "float32", "lse2": "float32"}}
    kinds |= {{output.name: output.dtype for output in launch.outputs}}
    names = [name.removeprefix("into_") for name in launch.inputs] + [output.name for output in launch.outputs]
    found = [gluon._POINTERS[kinds.get(name, dtype)] for name in names]
    return found[: len(launch.inputs)] + ["i32"] * len(launch.scalars) + found[len(launch.inputs) :]


cases = [
    (head_dim, dtype, part, *lengths)
    for head_dim in (64, 128)
    for dtype, part in (("bfloat16", plan.WHOLE), ("float16", plan.Part(accumulate=True, dtype="float32")))
    for lengths in ((8192, 1), (2048, 1), (8192, 64))
]
for head_dim, dtype, part, tokens, sequences in cases:
    asked = problem(tokens, head_dim, dtype, sequences=sequences)
    for name, launch in launches(asked, part):
        kinds = pointers(launch, dtype)
        constexprs = tuple(launch.constexprs.items())
        compiled = gluon.compile_kernel(launch.kernel, "9.0", tuple(kinds), constexprs, launch.num_warps, 1)
        ptx = compiled.asm["ptx"]
        chosen = config.choose_config(name, head_dim, dtype, "9.0")
        bound = config.shared_memory(name, chosen, head_dim, dtype, "sm_90")
        assert compiled.metadata.shared <= bound <= config.SHARED_MEMORY["sm_90"], (name, bound)
        assert compiled.metadata.global_scratch_size == launch.scratch
        assert f".reqntid {{32 * compiled.metadata.num_warps}}" in ptx
        entry = ptx[ptx.index(".entry") :]
        # Behind its own parameters come global_scratch and profile_scratch.
        assert entry[: entry.index("{{")].count(".param ") == len(kinds) + 2
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            command = [ptxas, "-v", "-arch=sm_90a", "-o", os.devnull, file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilt = int(report.split(" bytes spill stores")[0].split()[-1])
        assert spilt <= SPILLS.get(name, 0), (name, head_dim, report)
        assert "C75" not in report, report
        print(name)
"""


@needs_triton
def test_they_compile_without_spills_within_their_memory(request, tmp_path, monkeypatch):
    """On any machine: Triton brings its own assembler. In a process of its own, for this one may interpret."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(hopper.VARIABLE, "1")
    code = COMPILE.format(tests=str(request.path.parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert set(result.stdout.split()) == set(config.HOPPER_KERNELS)


def rank_arrays(case, rank, inputs):
    rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
    gathered = oracle.gathered_rows(case.cu_seqlens, case.world_size, case.padding)
    return (
        inputs["q"][rows], inputs["k"][gathered], inputs["v"][gathered], inputs["dout"][rows],
        np.ascontiguousarray(inputs["dlse"][:, rows]),
    )  # fmt: skip


def assert_exact(case, rank, inputs, results):
    """`results` of one rank are as close to the oracle's as a straightforward computation."""
    rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
    exact, straightforward = (
        oracle.rank_attention(
            inputs["q"], inputs["k"], inputs["v"], case.cu_seqlens, rank, case.world_size, case.causal,
            dout=inputs["dout"][rows], dlse=inputs["dlse"][:, rows], arithmetic=arithmetic,
        )._asdict()
        for arithmetic in (oracle.EXACT, oracle.straightforward(case.dtype))
    )  # fmt: skip
    for name in RESULTS:
        assert_close(f"rank {rank} of {case.world_size}: {name}", results[name], exact[name], straightforward[name])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("case", [*SELECTED, UNEVEN, PLAIN], ids=str)
def test_they_match_the_oracle_in_both_frameworks(case, forced):
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        arrays = rank_arrays(case, rank, inputs)
        results = frameworks.attend_torch(case, *arrays, rank, "triton")
        theirs = frameworks.attend_jax(case, *arrays, rank, "triton")
        assert_exact(case, rank, inputs, results)
        for name in RESULTS:
            assert results[name].tobytes() == theirs[name].tobytes(), f"rank {rank}, {name}: torch and JAX differ"
    assert forced == KERNELS


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("case", [*SELECTED, UNEVEN, PLAIN], ids=str)
def test_the_fused_backward_matches_the_oracle(case, forced, monkeypatch):
    monkeypatch.setattr(plan, "backward", functools.partial(plan.backward, deterministic=False))
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        arrays = rank_arrays(case, rank, inputs)
        assert_exact(case, rank, inputs, frameworks.attend_torch(case, *arrays, rank, "triton"))
    assert forced == {"attention_forward_hopper"}  # and neither kernel of the pair


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("case", [UNEVEN, PLAIN], ids=str)
@pytest.mark.parametrize("foul", [np.nan, np.inf])
def test_no_other_sequence_and_no_padding_reaches_a_result(case, foul, forced):
    inputs = make_inputs(case)
    gathered = oracle.gathered_rows(case.cu_seqlens, case.world_size, case.padding)
    for rank in range(case.world_size):
        q, k, v, dout, dlse = rank_arrays(case, rank, inputs)
        clean = frameworks.attend_torch(case, q, k, v, dout, dlse, rank, "triton")
        rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
        keys_of, rows_of = (np.searchsorted(case.cu_seqlens[1:], x, "right") for x in (gathered, rows))
        for sequence in {*keys_of}:  # the last is the padding
            spoilt = (np.where((keys_of == sequence)[:, None, None], np.float32(foul), x) for x in (k, v))
            result = frameworks.attend_torch(case, q, *spoilt, dout, dlse, rank, "triton")
            others, other_keys = rows_of != sequence, keys_of != sequence
            np.testing.assert_array_equal(result["lse"][:, others], clean["lse"][:, others])
            for name, kept in {"out": others, "dq": others, "dk": other_keys, "dv": other_keys}.items():
                np.testing.assert_array_equal(result[name][kept], clean[name][kept])
            foul_rows = (np.where((rows_of == sequence)[:, None, None], np.float32(foul), x) for x in (q, dout))
            spoilt_q, spoilt_dout = foul_rows
            result = frameworks.attend_torch(case, spoilt_q, k, v, spoilt_dout, dlse, rank, "triton")
            for name, kept in {"out": others, "dq": others, "dk": other_keys, "dv": other_keys}.items():
                np.testing.assert_array_equal(result[name][kept], clean[name][kept])


@pytest.mark.gpu
@needs_hopper
def test_six_of_them_in_one_function_of_jax(forced):
    """XLA makes CUDA graphs of so many kernels, in which nothing can be allocated; one rank in `shard_map` likewise."""
    q, k, v, *_ = rank_arrays(PLAIN, 0, make_inputs(PLAIN))
    q, k, v = (jnp.asarray(x, PLAIN.dtype) for x in (q, k, v))
    cu_seqlens = jnp.asarray(PLAIN.cu_seqlens, jnp.int32)

    def layers(q, k, v, cu_seqlens):
        for _ in range(6):
            q = zigzag_jax.zigzag_attention(q, k, v, cu_seqlens)
        return q

    one_by_one = layers(q, k, v, cu_seqlens)
    mesh = Mesh(jax.devices()[:1], ("cp",))
    together, sharded = (
        jax.jit(function)
        for function in (layers, jax.shard_map(layers, mesh=mesh, in_specs=(P("cp"), P(), P(), P()), out_specs=P("cp")))
    )
    for _ in range(3):
        np.testing.assert_array_equal(together(q, k, v, cu_seqlens), one_by_one)
        np.testing.assert_array_equal(sharded(q, k, v, cu_seqlens), one_by_one)
    assert forced == {"attention_forward_hopper"}
