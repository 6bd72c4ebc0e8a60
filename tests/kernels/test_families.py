"""Families of kernels: one that a test registers is launched, tuned and diagnosed without any other change."""

import json
from dataclasses import replace

import pytest
import triton
import triton.language as tl

from zigzag_kernels import doctor, families, plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.family import Family
from zigzag_kernels.modes import LengthClass, Operation
from zigzag_kernels.problem import ArraySpec, make_problem
from zigzag_kernels.tiles import override
from zigzag_kernels.tiles.config import Architecture, KernelId, TileConfig, up_to

FORWARD = KernelId("sm100", Operation.FORWARD)
SHORT = KernelId("sm100", Operation.FORWARD, LengthClass.SHORT)
SM_100 = Architecture(
    name="sm_100",
    targets=("10.",),
    measured_on=("10.0",),
    shared_memory=227 * 1024,
    operands_from_registers=True,
    sums_apart=True,
    tiles={
        "16-bit": {FORWARD: up_to((256, 128, 4, 3), (256, 128, 4, 2)), SHORT: up_to((128, 64, 4, 3), (128, 64, 4, 2))},
        "32-bit": {},
    },
)


@triton.jit
def attention_forward_sm100(  # noqa: PLR0917  (the entry point of a kernel)
    q_ptr, k_ptr, v_ptr, sinks_ptr, segments_ptr, into_out_ptr, into_lse_ptr, n_segments, T, slot_rows, first_kv_head,
    out_ptr, lse_ptr, SLOTS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTMAX_SCALE: tl.constexpr, RANGED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_MAX: tl.constexpr,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr,
    STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES_TOGETHER: tl.constexpr,
    ACCUMULATE: tl.constexpr, HEADS: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """A kernel with a constant that no other has; the plan never looks inside."""


class Sm100(Family):
    name = "sm100"
    variable = "ZIGZAG_SM100"
    architectures = (SM_100,)

    def can_run(self, problem, operation, dout_strides):
        return operation is Operation.FORWARD and problem.target == "10.0" and problem.dtype != "float32"

    def is_faster(self, problem, operation):
        return problem.head_dim == 128

    def length_class(self, problem):
        return LengthClass.SHORT if problem.sequences > 64 else LengthClass.FEW_ROWS

    def shared_memory(self, kernel, config, head_dim, dtype, architecture):
        return config.num_stages * 2**16

    def exceeds(self, kernel, config, head_dim, dtype, architecture):
        return None

    def make_launches(self, draft):
        resources = {"num_warps": draft.config.num_warps, "num_stages": draft.config.num_stages}
        return (draft.launch(attention_forward_sm100, {"CLUSTER": 2}, **resources),)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (Sm100(), *families.FAMILIES))


def problem(target="10.0", head_dim=128, sequences=1):
    q = ArraySpec((8192, 8, head_dim), "bfloat16", (8 * head_dim, head_dim))
    kv = ArraySpec((8192, 2, head_dim), "bfloat16", (2 * head_dim, head_dim))
    call = make_call_spec(head_dim=head_dim, backend="triton", deterministic=False)
    return make_problem(q, kv, kv, call, sequences=sequences, world_size=1, target=target)


def planned(asked):
    """{operation: kernel} of a step, and the launch of its forward."""
    step = plan.plan_step(asked)
    kernels = {x.kernel.operation: x.kernel for x in step if x.kernel}
    (forward,) = next(x.launches for x in step if x.kernel and x.kernel.operation is Operation.FORWARD)
    return kernels, forward


def test_a_registered_family_serves_its_gpu_and_no_other_operation():
    kernels, forward = planned(problem())
    assert kernels == {
        Operation.FORWARD: FORWARD,
        Operation.DKDV: KernelId("portable", Operation.DKDV),
        Operation.DQ: KernelId("portable", Operation.DQ),
    }
    assert forward.kernel is attention_forward_sm100
    assert (forward.num_warps, forward.num_stages, forward.constexprs["CLUSTER"]) == (4, 2, 2)
    assert (forward.constexprs["BLOCK_M"], forward.constexprs["BLOCK_N"]) == (256, 128)
    assert forward.grid == ((8192 * 4 // 256 + 3) * 2, 1, 1)
    without = replace(problem(), target="9.0")
    assert {kernel.family for kernel in planned(without)[0].values()} == {"portable"}


def test_the_steps_run_its_kernel():
    launched = []

    def run(launch, *arrays):
        launched.append((launch.kernel, arrays))
        return launch.outputs

    with plan.use_planner(plan.Planner()):
        out, lse = plan.forward(run, problem(), "q", "k", "v", "segments")
    assert launched == [(attention_forward_sm100, ("q", "k", "v", "q", "segments", None, None))]
    assert (out.shape, lse.shape) == ((8192, 8, 128), (8, 8192))


def test_it_says_which_problems_and_length_classes_it_serves():
    assert planned(problem(sequences=65))[0][Operation.FORWARD] == SHORT
    assert planned(problem(sequences=64))[0][Operation.FORWARD] == FORWARD  # FEW_ROWS has no tiles of its own
    assert planned(problem(head_dim=64))[0][Operation.FORWARD].family == "portable"


@pytest.mark.parametrize(("value", "served"), [("0", {128: "portable"}), ("1", {128: "sm100", 64: "sm100"})])
def test_its_variable_keeps_it_away_or_has_it_serve_all_it_can(monkeypatch, value, served):
    monkeypatch.setenv("ZIGZAG_SM100", value)
    for head_dim, family in served.items():
        assert planned(problem(head_dim=head_dim))[0][Operation.FORWARD].family == family
    assert planned(problem(target="9.0"))[0][Operation.FORWARD].family == "portable"


def test_another_value_of_its_variable_is_refused(monkeypatch):
    monkeypatch.setenv("ZIGZAG_SM100", "yes")
    with pytest.raises(ValueError, match="ZIGZAG_SM100: expected 0 or 1, got 'yes'"):
        plan.plan_step(problem())


def test_users_replace_its_tiles_by_name(monkeypatch, tmp_path):
    path, tiles = tmp_path / "tiles.json", {"BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 8, "num_stages": 3}
    monkeypatch.setenv(override.VARIABLE, str(path))
    path.write_text(json.dumps({"sm_100": {"16-bit": {"sm100_forward": {"128": tiles}}}}))
    _, forward = planned(problem())
    assert (forward.constexprs["BLOCK_M"], forward.num_warps) == (128, 8)
    assert families.choose_tiles(SHORT, 128, "bfloat16", "10.0") == TileConfig(128, 64, 4, 2)
    path = path.with_name("other.json")
    monkeypatch.setenv(override.VARIABLE, str(path))
    path.write_text(json.dumps({"sm_100": {"16-bit": {"sm100_forward": {"128": tiles | {"num_stages": 4}}}}}))
    with pytest.raises(ValueError, match="needs 262144 bytes of shared memory, the GPU has 232448"):
        plan.plan_step(problem())


def test_the_doctor_knows_it(monkeypatch):
    versions = {"python": "3.12.3", "torch": "2.13.0", "triton": "3.6.0"}
    machine = doctor.Machine(versions, [("B200", "10.0")], environment={"ZIGZAG_SM100": "yes"})
    (finding,) = doctor.diagnose(machine)
    assert finding.text == "ZIGZAG_SM100 is 'yes', neither 0 nor 1"
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES[1:])
    finding, unread = doctor.diagnose(machine)
    assert unread.text.startswith("ZIGZAG_SM100 is set, and nothing reads it")
    assert finding.note
    assert finding.text == "B200, compute capability 10.0, takes the tiles of sm_90, not measured on it"
