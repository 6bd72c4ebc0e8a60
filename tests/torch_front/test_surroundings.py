"""What PyTorch switches on around a call changes no bit of its results, in the forward pass or in the backward pass."""

import contextlib
import functools
import itertools

import pytest
import torch

import zigzag_torch
from tests.support.machine import GPU
from tests.support.processes import run_ranks

DEVICE = "cuda" if GPU else "cpu"
W, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
LENGTHS, PADDING = (12, 0, 40), 2


def offsets(world_size=1):
    starts = list(itertools.accumulate(LENGTHS, initial=0))
    return torch.tensor([start // world_size for start in starts], dtype=torch.int32, device=DEVICE)


TOKENS = sum(LENGTHS) // W + PADDING


@contextlib.contextmanager
def restored(get, set_, value):
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


def default_dtype(dtype):
    return restored(torch.get_default_dtype, torch.set_default_dtype, dtype)


def deterministic():
    return restored(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


def matmul_precision():
    return restored(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium")


SURROUNDINGS = {
    "autocast": lambda: torch.autocast(DEVICE, dtype=torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "matmul precision": matmul_precision,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}
ONLY_BACKWARD, ONLY_FORWARD = {"no_grad"}, {"inference_mode"}


def attention(backend):
    return lambda q, k, v: zigzag_torch.zigzag_attention(q, k, v, offsets(), return_lse=True, backend=backend)


def batched(backend):
    return lambda *qkv: zigzag_torch.zigzag_attention(*(x[None] for x in qkv), return_lse=True, backend=backend)


def gathered(backend):
    def call(q, k, v):
        batch = zigzag_torch.prepare_batch(offsets(), 1, W, backend=backend)
        return zigzag_torch.zigzag_attention_gathered(q[:TOKENS], k, v, batch, 1, W, return_lse=True, backend=backend)

    return call


def published(**flags):
    def call(q, k, v):
        lengths = offsets(), offsets(), max(LENGTHS), max(LENGTHS)
        with zigzag_torch.ZigzagConfig(**flags):
            out, lse, _ = zigzag_torch.zigzag_llama3_flash_attn_varlen_func(
                q, k, v, *lengths, 1, slice(None), causal=True, return_attn_probs=True
            )
        return out, lse

    return call


def grouped(q, k, v, fused=False):
    kv, cu_seqlens = torch.stack((k, v)), offsets(W)
    groups = zigzag_torch.split_q_by_zigzag_chunk_index(q[:TOKENS], cu_seqlens, W, 1)
    slices = zigzag_torch.compute_kv_slices_for_groups(cu_seqlens, 1, 2, W, groups[1])
    last = None, 0.0, True, (-1, -1), None, True, W, cu_seqlens
    call = zigzag_torch.execute_grouped_attention
    if fused:
        call, last = zigzag_torch.replace_grouped_attention_with_fused_triton_v2, (*last, 1, 2)
    else:
        zigzag_torch.rearrange_kv_from_zigzag_to_contiguous(kv, W, cu_seqlens)
    return call(*groups, kv, slices, HEADS, HEAD_DIM, *last)[:2]


def two_chunks(q, k, v):
    starts = offsets(2 * W)
    rows = sum(LENGTHS) // (2 * W)
    return zigzag_torch.fused_zigzag_llama3_flash_attn_forward_v2(
        q[:rows], q[rows : 2 * rows], k, v, starts, starts, offsets(), 1, 2, 2 * W
    )


def merged(q, k, v):
    lse = q.float().sum(-1).T
    return zigzag_torch.merge_partials(torch.stack((q, 2 * q)), torch.stack((lse, -lse)))


def moved(q, k, v):
    local = zigzag_torch.shard(q, offsets(), 1, W)
    whole = zigzag_torch.unshard(torch.cat((local, local)), offsets(), W)
    padded, lengths = zigzag_torch.pad_to_zigzag(q, offsets(), 4)
    positions = zigzag_torch.position_ids(offsets(), 1, W), zigzag_torch.local_cu_seqlens(offsets(), W)
    return whole, padded, zigzag_torch.unpad(padded, offsets(), 4), lengths, *positions


def calls(kernel_backend):
    """{name: function of (q, k, v)} for every public call."""
    by_backend = {"attention": attention, "batched": batched, "gathered": gathered}
    named = {f"{n} {b}": f(b) for n, f in by_backend.items() for b in ("reference", kernel_backend)}
    return named | {
        "published": published(),
        "published, unfused": published(use_fused_triton_v2=False),
        "published, verified": published(verify_correctness=True),
        "grouped": grouped,
        "grouped, fused": lambda *qkv: grouped(*qkv, fused=True),
        "two chunks": two_chunks,
        "merge_partials": merged,
        "shard and pad": moved,
    }


def inputs(dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(W * TOKENS, heads, HEAD_DIM, generator=generator, device=DEVICE).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def results(call, tensors, forward=contextlib.nullcontext, backward=contextlib.nullcontext, gradients=True):
    """Results of `call` and its gradients, each pass inside of its own context."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    with forward():
        outputs = call(*leaves)
    differentiable = [x for x in outputs if x.requires_grad]
    if not gradients or not differentiable:
        return outputs
    cotangents = [torch.linspace(-1, 1, x.numel(), device=DEVICE).reshape(x.shape).to(x.dtype) for x in differentiable]
    with backward():
        found = torch.autograd.grad(differentiable, leaves, cotangents, allow_unused=True)
    return *outputs, *(x for x in found if x is not None)


@functools.cache
def without_surroundings(kernel_backend, dtype):
    """{name of a call: its results}, gradients behind the outputs."""
    return {name: results(call, inputs(dtype)) for name, call in calls(kernel_backend).items()}


def assert_same_bits(where, ours, theirs):
    assert len(ours) == len(theirs), where
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, f"{where}: {i}"
        assert torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num()), f"{where}: {i}"


def around(name):
    """The contexts of the forward pass and of the backward pass in which the surroundings `name` are on."""
    there, nothing = SURROUNDINGS[name], contextlib.nullcontext
    if name in ONLY_BACKWARD:
        return [(nothing, there)]
    return [(there, nothing)] if name in ONLY_FORWARD else [(there, nothing), (nothing, there), (there, there)]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.usefixtures("each_launch_once")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_no_bit_changes(name, kernel_backend):
    dtype, wanted = torch.bfloat16 if name == "autocast" else torch.float32, name not in ONLY_FORWARD
    tensors, expected = inputs(dtype), without_surroundings(kernel_backend, dtype)
    for call_name, call in calls(kernel_backend).items():
        for forward, backward in around(name):
            ours = results(call, tensors, forward, backward, gradients=wanted)
            theirs = expected[call_name] if wanted else expected[call_name][: len(ours)]
            assert_same_bits(f"{call_name}, {name}", ours, theirs)


def test_float32_and_mixed_inputs_are_cast_under_autocast(kernel_backend):
    """As by `scaled_dot_product_attention`; gradients have the types of the inputs."""
    narrow = inputs(torch.bfloat16)
    for call_name, call in calls(kernel_backend).items():
        if call_name in ("merge_partials", "shard and pad"):
            continue
        expected = results(call, narrow)
        for dtypes in ([torch.float32] * 3, [torch.float32, torch.float32, torch.bfloat16]):
            if "grouped" in call_name and dtypes[1] != dtypes[2]:
                continue  # k and v are one tensor there
            tensors = [x.to(dtype) for x, dtype in zip(narrow, dtypes, strict=True)]
            ours = results(call, tensors, SURROUNDINGS["autocast"])
            outputs = len(ours) - 3
            assert_same_bits(call_name, ours[:outputs], expected[:outputs])
            assert [x.dtype for x in ours[outputs:]] == dtypes
            assert_same_bits(call_name, [x.bfloat16() for x in ours[outputs:]], expected[outputs:])


def check_group(rank, world_size):
    group = torch.distributed.group.WORLD
    for dtype, names in ((torch.bfloat16, ["autocast"]), (torch.float32, set(SURROUNDINGS) - {"autocast"})):
        tensors = [zigzag_torch.shard(x, offsets(), rank, world_size) for x in inputs(dtype)]
        for method, backend in itertools.product(("allgather", "ring"), ("reference", "interpret")):

            def call(q, k, v, method=method, backend=backend):
                options = {"group": group, "method": method, "backend": backend}
                return zigzag_torch.zigzag_attention(q, k, v, offsets(), return_lse=True, **options)

            expected = results(call, tensors)
            for name in sorted(names):
                for forward, backward in around(name)[-1:]:
                    ours = results(call, tensors, forward, backward, gradients=name not in ONLY_FORWARD)
                    assert_same_bits(f"{method}, {backend}, {name}", ours, expected[: len(ours)])


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_bit_changes_between_ranks(tmp_path):
    run_ranks(W, tmp_path, check_group)
