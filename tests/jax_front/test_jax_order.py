"""The order that JAX has to keep between ranks: transfers start early enough to overlap, and late enough for memory.

Order is data flow here: an operation needs another if its operands come of that one's results, or pass a barrier with
them. All of it is in the traced function, so that no device is needed.
"""

import re
from collections import Counter

import jax
import pytest
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support.spread import KERNELS
from tests.support.windows import in_one_kernel

TRANSFERS = "all_gather", "reduce_scatter", "ppermute"
WORLD_SIZE, WINDOWS = 6, 4
ARGUMENTS = "q", "k", "v", "cu_seqlens", "dout"


def traced_step(**options):
    """The equations of one rank, forward and backward, for ARGUMENTS."""

    def step(q, k, v, cu_seqlens, dout):
        def attend(q, k, v):
            return zigzag_jax.zigzag_attention(q, k, v, cu_seqlens, axis_name="cp", backend=KERNELS, **options)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    mesh = AbstractMesh((WORLD_SIZE,), ("cp",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("cp"),) * 3 + (P(), P("cp")), out_specs=P("cp"))
    rows = jax.ShapeDtypeStruct((16 * WORLD_SIZE, WINDOWS, 16), "bfloat16")
    offsets = jax.ShapeDtypeStruct((3,), "int32")
    (equation,) = jax.make_jaxpr(mapped)(rows, rows, rows, offsets, rows).eqns
    return equation.params["jaxpr"]


def needs(jaxpr, inputs):
    """{operation: the operations and `inputs` that must be there before it}, of transfers, kernels and loops.

    An operation is called by its kind and how many of that kind come before it: "all_gather 0".
    """
    behind = {x: frozenset([name]) for x, name in zip(jaxpr.invars, inputs, strict=True)}
    found, counts = {}, Counter()
    for equation in jaxpr.eqns:
        operands = (x for x in equation.invars if not isinstance(x, Literal))
        needed = frozenset().union(*(behind.get(x, frozenset()) for x in operands))
        kind = kind_of(equation)
        if kind:
            operation = f"{kind} {counts[kind]}"
            counts[kind] += 1
            found[operation] = needed
            needed |= {operation}
        behind |= dict.fromkeys(equation.outvars, needed)
    return found


def kind_of(equation):
    """The name of a kernel, which its scope has, that of a transfer or of a loop, or None."""
    name = equation.primitive.name
    if name != "custom_vmap_call":
        return name if name in (*TRANSFERS, "scan") else None
    scopes = " ".join(str(inner.source_info.name_stack) for inner in equation.params["call"].jaxpr.eqns)
    (kernel,) = set(re.findall(r"zigzag::(\w+)", scopes))
    return kernel


def numbers(needed, kind):
    return {int(name.split()[-1]) for name in needed if name.startswith(f"{kind} ")}


@pytest.fixture(scope="module")
def windows():
    return needs(traced_step(heads_k_stride=1), ARGUMENTS)


@pytest.mark.parametrize(
    ("first_gather", "reader"), [(0, "attention_forward"), (2 * WINDOWS, "backward_dq")], ids=["forward", "backward"]
)
def test_a_window_is_gathered_beside_the_one_before_and_behind_the_one_before_that(windows, first_gather, reader):
    """One more window in flight would be one more in memory, one less would leave the GPU waiting."""
    assert len(numbers(windows, "all_gather")) == 2 * 2 * WINDOWS
    for window in range(WINDOWS):
        for i in range(2):  # K and V
            gather = windows[f"all_gather {first_gather + 2 * window + i}"]
            assert numbers(gather, reader) == set(range(window - 1)), window
            assert numbers(gather, "all_gather") >= set(range(first_gather, first_gather + 2 * window)), window


def test_the_backward_pass_gathers_once_more(windows):
    """Its collectives need what only the backward pass has: else XLA would take them for those of the forward."""
    for name, needed in windows.items():
        if name.startswith("all_gather"):
            assert ("dout" in needed) == (int(name.split()[-1]) >= 2 * WINDOWS), name


def test_kernels_of_a_window_start_when_the_sums_of_the_one_before_are_there(windows):
    """But dQ does not wait for the sums of its own window, which are on their way meanwhile."""
    for window in range(WINDOWS):
        for kernel in ("backward_delta", "backward_dkdv", "backward_dq"):
            needed = windows[f"{kernel} {window}"]
            assert numbers(needed, "reduce_scatter") == set(range(2 * window)), (kernel, window)
            assert numbers(needed, "backward_dq") == set(range(window)), (kernel, window)


def test_sums_of_a_window_travel_beside_the_one_kernel_of_the_next_window():
    """Only what the window before the last has left is there before a kernel, so that two windows are in memory."""
    with in_one_kernel(stands_in=True):  # the step is traced and does not run, and its head_dim is small
        windows = needs(traced_step(heads_k_stride=1), ARGUMENTS)
    for window in range(WINDOWS):
        for i in range(2):  # dK and dV
            assert f"backward_dkdv {window}" in windows[f"reduce_scatter {2 * window + i}"]
            gather = windows[f"all_gather {2 * WINDOWS + 2 * window + i}"]
            assert numbers(gather, "backward_dq") == set(range(window - 1)), window
        for kernel in ("backward_delta", "backward_dkdv", "backward_dq"):
            needed = windows[f"{kernel} {window}"]
            assert numbers(needed, "reduce_scatter") == set(range(2 * (window - 1))), (kernel, window)
            assert numbers(needed, "backward_dq") == set(range(window)), (kernel, window)


@pytest.fixture(scope="module")
def ring():
    """The traced step around the loops, and the loops of forward and backward."""
    traced = traced_step(method="ring")
    loops = [equation.params for equation in traced.eqns if equation.primitive.name == "scan"]
    # The inputs of a loop's body: constants, which releases of JAX count in different places, what it carries, a table
    # of this step for forward and two for backward.
    carried = ((("k", "v", "out", "lse"), 1), (("k", "v", "dq", "dk", "dv"), 2))
    bodies = []
    for loop, (names, tables) in zip(loops, carried, strict=True):
        body = loop["jaxpr"].jaxpr
        constants = len(body.invars) - len(names) - tables
        bodies.append(needs(body, ["constant"] * constants + list(names) + ["table"] * tables))
    return needs(traced, ARGUMENTS), *bodies


def test_a_ring_sends_keys_beside_the_kernels_of_their_step_and_behind_those_of_the_one_before(ring):
    """A rank that could send early would have the keys of many ranks in memory."""
    _, forward, backward = ring
    for body, results in ((forward, {"out", "lse"}), (backward, {"dq", "dk", "dv"})):
        for i in range(2):  # K and V
            needed = body[f"ppermute {i}"]
            assert results <= needed
            assert not any(name.split("_")[0] in ("attention", "backward") for name in needed)


def test_a_ring_sends_gradients_while_dq_is_computed(ring):
    _, _, backward = ring
    for i in (2, 3):
        assert "backward_dkdv 0" in backward[f"ppermute {i}"]
        assert "backward_dq 0" not in backward[f"ppermute {i}"]
    assert not numbers(backward["backward_dq 0"], "ppermute")


def test_the_backward_pass_of_a_ring_sends_keys_once_more(ring):
    around, _, _ = ring
    sent = {name: needed for name, needed in around.items() if name.startswith("ppermute")}
    assert ["dout" in needed for needed in sent.values()] == [False] * 2 + [True] * (len(sent) - 2)
    assert len(sent) == 2 + 4 + 2
