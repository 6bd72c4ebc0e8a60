"""Bad input is refused with the argument's name, what was expected and what was got, before anything is launched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType

import zigzag_jax
import zigzag_torch
from tests.support.machine import GPU
from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import KVLayout, Method
from zigzag_kernels.problem import ArraySpec, make_problem


class Torch:
    package = zigzag_torch

    @staticmethod
    def array(shape, dtype="float32"):
        return torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda" if GPU else "cpu")

    @staticmethod
    def ints(values, dtype="int32"):
        return torch.tensor(values, dtype=getattr(torch, dtype), device="cuda" if GPU else "cpu")


class Jax:
    package = zigzag_jax

    @staticmethod
    def array(shape, dtype="float32"):
        return np.zeros(shape, dtype) if dtype in ("float64", "int64") else jnp.zeros(shape, dtype)

    @staticmethod
    def ints(values, dtype="int32"):
        return np.array(values, dtype) if dtype == "int64" else jnp.array(values, dtype)


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def framework(request, monkeypatch):
    """A framework in which a launch fails the test."""
    from zigzag_kernels import plan

    def launched(*_, **__):
        raise AssertionError("launched")

    for name in ("segment_tables", "forward", "backward"):
        monkeypatch.setattr(plan, name, launched)
    return request.param


Q, KV = (4, 4, 16), (8, 2, 16)
BAD = {
    "q 2-D": ({"q": (4, 16)}, {}, r"q: expected 3 dimensions .* got shape \(4, 16\)"),
    "q float64": ({"q": (Q, "float64")}, {}, "q: expected dtype .* got float64"),
    "k int32": ({"k": (KV, "int32")}, {}, "k: expected dtype .* got int32"),
    "k float16": ({"k": (KV, "float16")}, {}, "k: expected the dtype of q, float32, got float16"),
    "v shape": ({"v": (8, 1, 16)}, {}, r"v: expected the shape of k, \(8, 2, 16\), got \(8, 1, 16\)"),
    "k rows": ({"k": (9, 2, 16), "v": (9, 2, 16)}, {}, r"k: expected world_size \* tokens = 2 \* 4 = 8 rows, got 9"),
    "k head_dim": ({"k": (8, 2, 24), "v": (8, 2, 24)}, {}, "k: expected the head_dim of q, 16, got 24"),
    "head ratio": ({"q": (4, 3, 16)}, {}, "q: expected a number of heads divisible by the 2 heads of k and v, got 3"),
    "head_dim 12": ({"q": (4, 4, 12), "k": (8, 2, 12), "v": (8, 2, 12)}, {}, "head_dim: .* from 8 to 256, got 12"),
    "head_dim 0": ({"q": (4, 4, 0), "k": (8, 2, 0), "v": (8, 2, 0)}, {}, "head_dim: .* from 8 to 256, got 0"),
    "head_dim 264": ({"q": (4, 4, 264), "k": (8, 2, 264), "v": (8, 2, 264)}, {}, "head_dim: .* got 264"),
    "no heads": ({"q": (4, 0, 16)}, {}, "q: expected a number of heads divisible .* got 0"),
    "cu_seqlens float": (
        {"cu_seqlens": ([0, 8], "float32")},
        {},
        "cu_seqlens: expected dtype int32, or other integers, got float32",
    ),
    "cu_seqlens 2-D": ({"cu_seqlens": [[0, 8]]}, {}, r"cu_seqlens: expected shape \[N \+ 1\], got \(1, 2\)"),
    "rank None": ({}, {"rank": None}, "rank: expected an int or an array of one integer, got NoneType"),
    "scale too small": (
        {},
        {"softmax_scale": 1e-320},
        "softmax_scale: expected a number from 1e-30 to .* got 1e-320",
    ),
    "scale too large": (
        {},
        {"softmax_scale": 1e300},
        "softmax_scale: expected a number from 1e-30 to .* got 1e.300",
    ),
    "return_lse": ({}, {"return_lse": "yes"}, "return_lse: expected True or False, got 'yes'"),
    "rank": ({}, {"rank": 2}, "rank: expected 0 to 1, got 2"),
    "negative rank": ({}, {"rank": -1}, "rank: expected 0 to 1, got -1"),
    "rank float": ({}, {"rank": 0.5}, "rank: expected an int or .* got float"),
    "world_size": ({}, {"world_size": 0}, "world_size: expected a positive int, got 0"),
    "world_size float": ({}, {"world_size": 2.0}, "world_size: expected a positive int, got 2.0"),
    "scale zero": ({}, {"softmax_scale": 0.0}, "softmax_scale: expected a positive finite number, got 0.0"),
    "scale nan": ({}, {"softmax_scale": float("nan")}, "softmax_scale: expected a positive finite number, got nan"),
    "scale inf": ({}, {"softmax_scale": float("inf")}, "softmax_scale: expected a positive finite number, got inf"),
    "causal None": ({}, {"causal": None}, "causal: expected True or False, got None"),
    "deterministic 0": ({}, {"deterministic": 0}, "deterministic: expected True or False, got 0"),
    "scale text": ({}, {"softmax_scale": "1"}, "softmax_scale: expected a Python number, got str"),
    "sinks shape": (
        {"sinks": ((3,), "float32")},
        {},
        r"sinks: expected shape \[heads\] = \(4,\) as in q, got \(3,\)",
    ),
    "sinks int32": ({"sinks": ((4,), "int32")}, {}, "sinks: expected floating-point numbers, got int32"),
    "window_size": (
        {},
        {"window_size": (1, 2, 3)},
        r"window_size: expected \(left, right\), tokens on each side of a token, -1 for all, got \(1, 2, 3\)",
    ),
    "negative window": ({}, {"window_size": (-2, 0)}, r"window_size: expected .* got \(-2, 0\)"),
    "attention_chunk": (
        {},
        {"attention_chunk": -1},
        "attention_chunk: expected a number of tokens, or 0 for none, got -1",
    ),
    "softcap": ({}, {"softcap": -1.0}, "softcap: expected a number from 1e-06 to .*, or 0 for none, got -1.0"),
    "return_max_logits": ({}, {"return_max_logits": 1}, "return_max_logits: expected True or False, got 1"),
    "layout": ({}, {"layout": "rows"}, "layout: expected 'document' or 'row', got 'rows'"),
    "odd rows": (
        {"q": (3, 4, 16), "k": (6, 2, 16), "v": (6, 2, 16)},
        {"layout": "row"},
        "q: expected an even number of local rows of each packed row, got 3",
    ),
    "backend": ({}, {"backend": "cuda"}, "backend: expected None, triton, interpret, reference, got 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_a_launch(framework, case, kernel_backend):
    changed, options, message = BAD[case]
    arguments = {"q": Q, "k": KV, "v": KV} | {name: changed[name] for name in changed if name != "cu_seqlens"}
    arrays = {
        name: framework.array(*spec) if isinstance(spec[1], str) else framework.array(spec)
        for name, spec in arguments.items()
    }
    cu_seqlens = changed.get("cu_seqlens", [0, 8])
    cu_seqlens = framework.ints(*cu_seqlens) if isinstance(cu_seqlens, tuple) else framework.ints(cu_seqlens)
    options = {"rank": 0, "world_size": 2, "backend": kernel_backend} | options
    with pytest.raises(ValueError, match=message):
        framework.package.zigzag_attention_gathered(**arrays, cu_seqlens=cu_seqlens, **options)


@pytest.mark.parametrize("make", [list, np.array], ids=["list", "numpy"])
def test_offsets_on_the_host_count_no_more_rows_than_there_are(framework, make):
    q, kv, local = framework.array(Q), framework.array(KV), framework.array((4, 2, 16))
    message = "cu_seqlens: expected to end at or before the {} rows there are, got 16"
    with pytest.raises(ValueError, match=message.format(8)):
        framework.package.zigzag_attention_gathered(q, kv, kv, make([0, 8, 16]), 0, 2)
    with pytest.raises(ValueError, match=message.format(4)):
        framework.package.zigzag_attention(q, local, local, make([0, 2, 16]))


@pytest.mark.skipif(GPU, reason="a mesh of devices of the CPU")
def test_offsets_of_whole_arrays_on_the_host_count_no_more_rows_than_there_are():
    attend = zigzag_jax.make_zigzag_attention(jax.make_mesh((1,), ("cp",), axis_types=(AxisType.Auto,)))
    q = jnp.zeros((8, 2, 16))
    with pytest.raises(ValueError, match="cu_seqlens: expected to end at or before the 8 rows there are, got 9"):
        attend(q, q, q, [0, 9])
    with pytest.raises(ValueError, match="cu_seqlens: expected no decrease, got 9 then 8"):
        attend(q[None], q[None], q[None], np.array([[0, 9, 8]]))


def test_what_was_accepted_lets_nothing_like_it_in(framework):
    """1.0 is a softmax_scale and True is not, though they are equal; a list cannot even be looked up."""
    q, kv, cu_seqlens = framework.array(Q), framework.array(KV), framework.ints([0, 8])

    def attend(**options):
        framework.package.zigzag_attention_gathered(q, kv, kv, cu_seqlens, 0, 2, backend="reference", **options)

    attend(softmax_scale=1.0)
    with pytest.raises(ValueError, match="softmax_scale: expected a Python number, got bool"):
        attend(softmax_scale=True)
    with pytest.raises(ValueError, match="causal: expected True or False, got 1"):
        attend(softmax_scale=1.0, causal=1)
    with pytest.raises(ValueError, match="deterministic: expected True or False, got 1"):
        attend(softmax_scale=1.0, deterministic=1)
    with pytest.raises(ValueError, match=r"causal: expected True or False, got \[True\]"):
        attend(causal=[True])


@pytest.mark.parametrize("bad", ["q", "k", "v", "cu_seqlens"])
def test_what_is_no_array_is_refused(framework, bad):
    arguments = {"q": framework.array(Q), "k": framework.array(KV), "v": framework.array(KV)}
    arguments |= {"cu_seqlens": framework.ints([0, 8])} | {bad: "text"}
    with pytest.raises(ValueError, match=f"{bad}: expected .* got str"):
        framework.package.zigzag_attention_gathered(**arguments, rank=0, world_size=2)


def test_a_rank_is_one_integer(framework):
    arguments = framework.array(Q), framework.array(KV), framework.array(KV), framework.ints([0, 8])
    with pytest.raises(ValueError, match=r"rank: expected an int or an array of one integer, got shape \(2,\) int64"):
        framework.package.zigzag_attention_gathered(*arguments, framework.ints([0, 1], "int64"), 2)
    with pytest.raises(ValueError, match=r"rank: expected an int or an array of one integer, got shape \(1,\) float32"):
        framework.package.zigzag_attention_gathered(*arguments, framework.array((1,)), 2)


def test_a_rank_is_checked_beside_a_prepared_batch_too(framework):
    batch = framework.package.prepare_batch(framework.ints([0, 8]), 1, 2, backend="reference")
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        framework.package.zigzag_attention_gathered(
            framework.array(Q), framework.array(KV), framework.array(KV), batch, 2, 2, backend="reference"
        )


def test_batched_input_wants_no_cu_seqlens_and_equal_shapes(framework):
    q, k = framework.array((2, 8, 4, 16)), framework.array((2, 8, 2, 16))
    with pytest.raises(ValueError, match="cu_seqlens: expected None"):
        framework.package.zigzag_attention(q, k, k, framework.ints([0, 16]))
    with pytest.raises(ValueError, match=r"v: expected \[batch, T\] = \[2, 8\]"):
        framework.package.zigzag_attention(q, k, framework.array((2, 7, 2, 16)))
    with pytest.raises(ValueError, match="deterministic: expected True or False, got None"):
        framework.package.zigzag_attention(q, k, k, deterministic=None)
    with pytest.raises(ValueError, match=r"k: expected .* got list"):
        framework.package.zigzag_attention(q, [1.0], k)
    with pytest.raises(ValueError, match=r"q: expected \[tokens, heads, head_dim\] or .* got shape \(\)"):
        framework.package.zigzag_attention(framework.array(()), k, k)


def test_options_between_ranks_are_checked_on_one_device_too():
    q = Torch.array((8, 2, 16))
    for option, message in {
        "method": "method: expected 'allgather', 'ring' or 'halo', got 'x'",
        "heads_k_stride": "heads_k_stride: expected an int or None, got 'x'",
        "grad_reduce_dtype": "grad_reduce_dtype: expected None, float32 or the dtype of q, .* got 'x'",
        "group": "group: expected a torch.distributed process group that this process is in, .* got str 'x'",
    }.items():
        with pytest.raises(ValueError, match=message):
            zigzag_torch.zigzag_attention(q, q, q, **{option: "x"})
    batch = zigzag_torch.prepare_batch(Torch.ints([0, 16]), 0, 2, method="ring", backend="reference")
    with pytest.raises(ValueError, match="method: expected that of the prepared batch, 'ring', got 'allgather'"):
        zigzag_torch.zigzag_attention_gathered(q, *[Torch.array((16, 2, 16))] * 2, batch, 0, 2)


def test_a_prepared_batch_is_of_one_world_size(framework):
    batch = framework.package.prepare_batch(framework.ints([0, 8]), 0, 4, backend="reference")
    with pytest.raises(ValueError, match="world_size: expected that of the prepared batch, 4, got 2"):
        framework.package.zigzag_attention_gathered(
            framework.array(Q), framework.array(KV), framework.array(KV), batch, 0, 2
        )


@pytest.mark.skipif(GPU, reason="the kernels are compiled here")
def test_a_backend_that_cannot_run_says_why(framework):
    q = framework.array((8, 2, 16))
    with pytest.raises(ValueError, match="backend: 'triton' expected"):
        framework.package.zigzag_attention(q, q, q, backend="triton")


@pytest.mark.parametrize("module", [zigzag_torch.parallel, zigzag_jax.parallel], ids=["torch", "jax"])
def test_more_keys_on_all_ranks_together_than_the_kernels_count_are_refused(module):
    """Those of one rank are few enough, so that a ring takes them."""
    rows = ArraySpec((2**28, 1, 64), "float16", (64, 64))
    call = make_call_spec(head_dim=64, backend="triton")
    problem = make_problem(rows, rows, rows, call, sequences=1, world_size=8, target="9.0", kv_layout=KVLayout.PEER)
    with pytest.raises(ValueError, match=f"expected at most {2**30} rows .*got {2**31}"):
        module.choose_transport(problem, "cp")
    ring = dataclasses.replace(problem, call=dataclasses.replace(call, method=Method.RING))
    assert module.choose_transport(ring, "cp").problem.kv_tokens == 2**28


def test_a_buffer_of_keys_and_values_too_wide_for_a_tile_is_refused():
    """Its rows are twice as far apart as those of k and of v, which are accepted."""
    rows = ArraySpec((8, 2**15, 256), "float16", (2**23, 256))
    call = make_call_spec(head_dim=256, backend="triton", heads_k_stride=2**15)
    problem = make_problem(rows, rows, rows, call, sequences=1, world_size=2, target="9.0", kv_layout=KVLayout.PEER)
    with pytest.raises(ValueError, match="k: expected strides"):
        zigzag_torch.parallel.choose_transport(problem, "a group")


def test_an_old_gpu_is_refused():
    from zigzag_kernels.checks import check_target

    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or newer, got 7\.5"):
        check_target("7.5")
    check_target("8.0")
    check_target("10.0")


@pytest.mark.parametrize(
    ("cu_seqlens", "rank", "tokens"),
    [
        ([0, 6], 0, 4),  # not a multiple of 2W
        ([0, 8, 4], 0, 4),  # decreasing
        ([4, 8], 0, 4),  # does not begin with 0
        ([0, 16], 0, 4),  # more than there are rows
        ([0, 2**31 - 8, -(2**31)], 0, 4),  # a difference that wraps around to 8
        ([0, 8], 2, 4),  # no such rank
        ([0, 8], -1, 4),
    ],
)
@pytest.mark.parametrize("package", [Torch, Jax], ids=["torch", "jax"])
def test_impossible_device_data_gives_nan_everywhere(package, cu_seqlens, rank, tokens, kernel_backend):
    """What only the device knows cannot raise: it must not look like a result either."""
    q, kv = package.array((tokens, 2, 16)), package.array((2 * tokens, 1, 16))
    for backend in (kernel_backend, "reference"):
        out, lse = package.package.zigzag_attention_gathered(
            q, kv, kv, package.ints(cu_seqlens), package.ints([rank]), 2, return_lse=True, backend=backend
        )
        assert np.isnan(np.asarray(out.tolist())).all()
        assert np.isnan(np.asarray(lse.tolist())).all()


@pytest.mark.parametrize("faulty", [3, 66])
def test_one_uneven_sequence_among_seventy_gives_nan_everywhere(faulty, kernel_backend):
    """The builder of the tables looks at 64 sequences together."""
    cu_seqlens = torch.full((71,), 4, dtype=torch.int32)
    cu_seqlens[0], cu_seqlens[faulty + 1] = 0, 6  # no multiple of 2 * world_size
    device = "cuda" if GPU else "cpu"
    q, kv = (torch.randn(rows, 1, 16, device=device) for rows in (141, 282))
    batch = cu_seqlens.cumsum(0, dtype=torch.int32).to(device), 0, 2
    out, lse = zigzag_torch.zigzag_attention_gathered(q, kv, kv, *batch, return_lse=True, backend=kernel_backend)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_impossible_device_data_gives_nan_gradients(kernel_backend):
    device = "cuda" if GPU else "cpu"
    q, k, v = (torch.randn(n, 1, 16, device=device, requires_grad=True) for n in (4, 8, 8))
    for cu_seqlens in ([0, 6], [0, 16]):
        out = zigzag_torch.zigzag_attention_gathered(
            q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32, device=device), 0, 2, backend=kernel_backend
        )
        for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
            assert gradient.isnan().all()
