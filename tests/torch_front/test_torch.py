"""What PyTorch adds to the kernels: `torch.compile`, checkpointing, views, and operators."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import zigzag_torch
from tests.support.cases import Case, make_inputs
from tests.support.hopper import PAIR, RUNS, assert_kernels_for_hopper, hopper_head_dim
from tests.support.machine import GPU
from tests.support.planners import RememberingPlanner
from tests.support.rank import rank_arrays
from zigzag_kernels import plan
from zigzag_kernels.callspec import make_call_spec
from zigzag_torch import launch

DEVICE = "cuda" if GPU else "cpu"
# In float32 a tensor of another type than its own goes unnoticed.
FLOAT32 = Case(name="float32", world_size=2, lengths=(12, 0, 40), heads=4, kv_heads=2, padding=2)
BFLOAT16 = replace(FLOAT32, name="bfloat16", dtype="bfloat16", head_dim=hopper_head_dim(FLOAT32.head_dim))
BOTH = pytest.mark.parametrize("case", [FLOAT32, BFLOAT16], ids=str)
CASE = BFLOAT16 if RUNS else FLOAT32


def tensors(case=CASE, rank=1):
    """q, gathered k and v, dout of `rank`, and cu_seqlens."""
    *arrays, _ = rank_arrays(case, make_inputs(case), rank)
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=DEVICE)
    return *(torch.tensor(x, dtype=getattr(torch, case.dtype), device=DEVICE) for x in arrays), cu_seqlens


def random_rows(case, *shape):
    """q, k and v `[*shape, heads, head_dim]`."""
    rows = {"device": DEVICE, "dtype": getattr(torch, case.dtype)}
    return [torch.randn(*shape, heads, case.head_dim, **rows) for heads in (case.heads, case.kv_heads, case.kv_heads)]


def gradients(function, q, k, v, dout):
    """`function(q, k, v)` and its gradients for the cotangent `dout`."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def attend(kernel_backend):
    def attend(q, k, v, cu_seqlens, **options):
        return zigzag_torch.zigzag_attention_gathered(q, k, v, cu_seqlens, 1, 2, backend=kernel_backend, **options)

    return attend


# dynamo forks its own wrappers; their deprecations are not ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@BOTH
def test_compiles_without_a_graph_break(attend, case):
    q, k, v, dout, cu_seqlens = tensors(case)

    def step(q, k, v):
        return attend(q * 2, k, v, cu_seqlens) * 0.5

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    results = gradients(compiled, q, k, v, dout)
    assert {x.dtype for x in results} == {q.dtype}
    assert_same(results, gradients(step, q, k, v, dout))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@BOTH
def test_compiles_for_any_length(kernel_backend, case):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q, k, v, cu_seqlens):
        return zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, backend=kernel_backend)

    for tokens in (8, 13, 21):
        q, k, v = random_rows(case, tokens)
        cu_seqlens = torch.tensor([0, 5, tokens], dtype=torch.int32, device=DEVICE)
        theirs = zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, backend=kernel_backend)
        assert torch.equal(compiled(q, k, v, cu_seqlens), theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_code_takes_numbers_of_later_calls(kernel_backend, dynamic):
    """Options are constants of the compiled code, and another value compiles it again."""
    torch.compiler.reset()  # there is a limit to that
    q, k, v, _, cu_seqlens = tensors(FLOAT32)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(q, k, v, **options):
        return zigzag_torch.zigzag_attention_gathered(q, k, v, cu_seqlens, 1, 2, backend=kernel_backend, **options)

    q.requires_grad_()
    for options in ({"softmax_scale": 0.25}, {"softmax_scale": 0.5}, {"softmax_scale": 1}, {}, {"causal": False}):
        results = [
            (out.detach(), *torch.autograd.grad(out.sum(), q))
            for out in (
                compiled(q, k, v, **options),
                zigzag_torch.zigzag_attention_gathered(q, k, v, cu_seqlens, 1, 2, backend=kernel_backend, **options),
            )
        ]
        assert_same(*results)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_exports_for_any_length(kernel_backend, strict):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, cu_seqlens):
            return zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, backend=kernel_backend)

    def inputs(tokens):
        q, k, v = (torch.randn(tokens, heads, 16, device=DEVICE) for heads in (2, 1, 1))
        return q, k, v, torch.tensor([0, 5, tokens], dtype=torch.int32, device=DEVICE)

    tokens = torch.export.Dim("tokens", min=2, max=1024)
    shapes = {"q": {0: tokens}, "k": {0: tokens}, "v": {0: tokens}, "cu_seqlens": None}
    exported = torch.export.export(Attention(), inputs(8), dynamic_shapes=shapes, strict=strict)
    for length in (8, 13):
        arguments = inputs(length)
        assert torch.equal(exported.module()(*arguments), Attention()(*arguments))


@BOTH
def test_operators_are_registered_as_torch_wants_them(kernel_backend, case):
    q, k, v, dout, cu_seqlens = tensors(case)
    rank = torch.ones(1, dtype=torch.int32, device=DEVICE)
    table_arguments = cu_seqlens, rank, 2, "gathered", kernel_backend
    tables = torch.ops.zigzag.segment_tables(*table_arguments)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.zigzag.segment_tables, table_arguments, test_utils=tests)
    call = make_call_spec(head_dim=case.head_dim, backend=kernel_backend, deterministic=False)
    constants = call.key, 2, "gathered"
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.zigzag.attention_forward, (*leaves, *tables, *constants), test_utils=tests)
    out, lse = torch.ops.zigzag.attention_forward(q, k, v, *tables, *constants)
    torch.library.opcheck(
        torch.ops.zigzag.attention_backward, (q, k, v, out, lse, dout, None, *tables, *constants), test_utils=tests
    )


def test_activation_checkpointing_changes_nothing(attend):
    q, k, v, dout, cu_seqlens = tensors()

    def step(q, k, v):
        return attend(q, k, v, cu_seqlens)

    def checkpointed(q, k, v):
        return torch.utils.checkpoint.checkpoint(step, q, k, v, use_reentrant=False)

    assert_same(gradients(checkpointed, q, k, v, dout), gradients(step, q, k, v, dout))


def test_a_prepared_batch_gives_the_same(attend, kernel_backend):
    q, k, v, dout, cu_seqlens = tensors()
    batch = zigzag_torch.prepare_batch(cu_seqlens, 1, 2, backend=kernel_backend)
    ours = gradients(lambda *qkv: attend(*qkv, batch), q, k, v, dout)
    assert_same(ours, gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout))


def test_views_are_read_in_place(attend):
    """q, k, v as slices of one projection, and gradients that arrive expanded: strides are part of the problem."""
    q, k, v, dout, cu_seqlens = tensors(FLOAT32)
    packed = torch.full((k.shape[0], 7, 16), float("nan"), device=DEVICE)
    packed[: q.shape[0], :4], packed[:, 4:6], packed[:, 5:7] = q, k, 0
    kv = torch.full((k.shape[0], 2, 3, 16), float("nan"), device=DEVICE)
    kv[:, :, 0], kv[:, :, 2] = k, v
    views = packed[: q.shape[0], :4], kv[:, :, 0], kv[:, :, 2]
    assert not any(x.is_contiguous() for x in views)
    out = attend(*views, cu_seqlens)
    assert torch.equal(out, attend(q, k, v, cu_seqlens))
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # last dimension not contiguous
    assert torch.equal(attend(*transposed, cu_seqlens), out)

    function = lambda *qkv: attend(*qkv, cu_seqlens).sum((0, 1))  # noqa: E731
    expanded = gradients(function, q, k, v, dout[0, 0])
    direct = gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout[:1, :1].expand_as(dout).contiguous())
    assert_same(expanded[1:], direct[1:])


def test_a_gradient_through_lse_alone(attend):
    q, k, v, _, cu_seqlens = tensors(FLOAT32)
    q.requires_grad_()
    _, lse = attend(q, k, v, cu_seqlens, return_lse=True)
    (ours,) = torch.autograd.grad(lse[lse.isfinite()].sum(), q)
    _, lse = zigzag_torch.zigzag_attention_gathered(q, k, v, cu_seqlens, 1, 2, return_lse=True, backend="reference")
    (theirs,) = torch.autograd.grad(lse[lse.isfinite()].sum(), q)
    torch.testing.assert_close(ours, theirs)


def test_equal_lengths_as_a_batch_dimension(kernel_backend):
    q, k, v = random_rows(CASE, 3, 10)
    out, lse = zigzag_torch.zigzag_attention(q, k, v, return_lse=True, backend=kernel_backend)
    assert out.shape == q.shape
    assert lse.shape == (3, 4, 10)
    for i in range(3):
        one, one_lse = zigzag_torch.zigzag_attention(q[i], k[i], v[i], return_lse=True, backend=kernel_backend)
        assert torch.equal(out[i], one)
        assert torch.equal(lse[i], one_lse)


def test_one_backward_equals_another(attend):
    q, k, v, dout, cu_seqlens = tensors()
    with plan.use_planner(RememberingPlanner()) as planner:
        first = gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout)
    assert_kernels_for_hopper(planner, PAIR)
    for _ in range(50 if GPU else 2):
        assert_same(gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout), first)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the operators one by one
def test_the_operator_and_vmap_give_the_gradients_of_an_eager_call(attend, kernel_backend):
    q, k, v, dout, cu_seqlens = tensors()
    expected = gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout)
    batch = zigzag_torch.prepare_batch(cu_seqlens, 1, 2, backend=kernel_backend)
    call = make_call_spec(head_dim=CASE.head_dim, backend=kernel_backend)
    constants = batch.segments, batch.sequences, call.key, 2
    operator = lambda *qkv: torch.ops.zigzag.attention_forward(*qkv, *constants)[0]  # noqa: E731
    assert_same(gradients(operator, q, k, v, dout), expected)
    vmapped = torch.func.vmap(lambda *qkv: attend(*qkv, batch))
    twice = [torch.stack([x, 2 * x]) for x in (q, k, v, dout)]
    assert_same([x[0] for x in gradients(vmapped, *twice)], expected)


def test_tensors_may_come_back_to_the_backward_pass_with_other_strides(attend):
    """As from hooks that keep them on the host meanwhile."""
    q, k, v, dout, cu_seqlens = tensors()
    step = lambda *qkv: attend(*qkv, cu_seqlens)  # noqa: E731
    expected = gradients(step, q, k, v, dout)

    def head_major(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x

    with torch.autograd.graph.saved_tensors_hooks(head_major, lambda x: x):
        assert_same(gradients(step, q, k, v, dout), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        assert_same(gradients(step, *(head_major(x) for x in (q, k, v)), dout), expected)


def test_nothing_depends_on_the_fast_path(attend, monkeypatch):
    q, k, v, dout, cu_seqlens = tensors()
    step = lambda *qkv: attend(*qkv, cu_seqlens)  # noqa: E731
    assert launch.fast_launch is not None
    expected = gradients(step, q, k, v, dout)
    monkeypatch.setattr(launch, "fast_launch", None)
    assert_same(gradients(step, q, k, v, dout), expected)
    with torch.no_grad():
        assert torch.equal(step(q, k, v), expected[0])


OPERATORS = ["zigzag::segment_tables", "zigzag::attention_forward", "zigzag::attention_backward"]


def test_a_plain_eager_call_goes_around_the_operators(attend):
    q, k, v, dout, cu_seqlens = tensors()
    step = lambda *qkv: attend(*qkv, cu_seqlens)  # noqa: E731
    with mock.patch.object(torch.library.CustomOpDef, "__call__", side_effect=AssertionError("went to the operator")):
        ours = gradients(step, q, k, v, dout)
        parameters = [torch.nn.Parameter(x) for x in (q, k, v)]
        assert torch.equal(step(*parameters), ours[0])
        with torch.no_grad():
            assert torch.equal(step(*parameters), ours[0])
        with pytest.raises(AssertionError, match="went to"), Seen():
            step(q, k, v)
    with Seen():  # the operators, and what is registered with them
        assert_same(gradients(step, q, k, v, dout), ours)


class Seen(TorchDispatchMode):
    """Names in `names` the operators of this library that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "zigzag":
            self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_a_mode_sees_the_operators(attend):
    q, k, v, dout, cu_seqlens = tensors()
    with Seen() as seen:
        gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout)
    assert seen.names == OPERATORS
    with Seen() as seen, torch.no_grad():
        attend(q, k, v, cu_seqlens)
    assert seen.names == OPERATORS[:2]


def test_a_policy_of_checkpointing_decides_on_the_operators(attend):
    """What it says to keep is not computed again."""
    q, k, v, dout, cu_seqlens = tensors()
    step = lambda *qkv: attend(*qkv, cu_seqlens)  # noqa: E731
    expected = gradients(step, q, k, v, dout)
    for policy, times in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)):
        contexts = lambda policy=policy: create_selective_checkpoint_contexts(lambda *_, **__: policy)  # noqa: E731
        saved = lambda *qkv: checkpoint(step, *qkv, use_reentrant=False, context_fn=contexts)  # noqa: B023, E731
        with Seen() as seen:
            assert_same(gradients(saved, q, k, v, dout), expected)
        assert seen.names.count("zigzag::attention_forward") == times


class Wrapped(torch.Tensor):
    """A tensor around another one, which writes down what is done with it."""

    names: list[str]

    @staticmethod
    def __new__(cls, x):
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device, requires_grad=x.requires_grad
        )
        wrapped.x = x
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.names.append(func.name())
        return func(*(x.x if isinstance(x, cls) else x for x in args), **kwargs or {})


def test_a_subclass_sees_the_operators(attend, kernel_backend):
    q, k, v, dout, cu_seqlens = tensors()
    batch = zigzag_torch.prepare_batch(cu_seqlens, 1, 2, backend=kernel_backend)
    expected = gradients(lambda *qkv: attend(*qkv, batch), q, k, v, dout)
    Wrapped.names = []
    with torch.no_grad():
        assert torch.equal(attend(Wrapped(q), k, v, batch), expected[0])
    wrapped = [Wrapped(x).requires_grad_() for x in (q, k, v)]
    out = attend(*wrapped, batch)
    assert_same((out.detach(), *torch.autograd.grad(out, wrapped, dout)), expected)
    assert [name for name in Wrapped.names if "zigzag" in name] == [OPERATORS[1], *OPERATORS[1:]]


def test_signs_and_zeros_that_are_not_in_memory_yet(attend):
    q, k, v, dout, cu_seqlens = tensors()
    step = lambda *qkv: attend(*qkv, cu_seqlens)  # noqa: E731
    negated = [torch._neg_view(x) for x in (q, k, v)]
    assert torch.equal(step(*negated), step(*(-x for x in (q, k, v))))
    with torch.no_grad():
        assert torch.equal(step(negated[0], k, v), step(-q, k, v))
    assert_same(gradients(step, q, k, v, torch._neg_view(dout)), gradients(step, q, k, v, -dout))
    zeros = torch._efficientzerotensor(dout.shape, dtype=dout.dtype, device=DEVICE)
    assert_same(gradients(step, q, k, v, zeros), gradients(step, q, k, v, torch.zeros_like(dout)))


def test_a_second_backward_pass_is_refused(attend):
    q, k, v, _, cu_seqlens = tensors()
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attend(q, k, v, cu_seqlens).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives in reverse mode"):
        dq.sum().backward()


def test_a_tensor_that_outlived_its_transform(attend):
    q, k, v, dout, cu_seqlens = tensors()
    kept = []
    torch.func.grad(lambda x: kept.append(x * 1) or x.sum())(q)
    expected = gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout)
    with torch.no_grad():
        assert torch.equal(attend(*kept, k, v, cu_seqlens), expected[0])
    k.requires_grad_()
    out = attend(*kept, k, v, cu_seqlens)
    assert torch.equal(out, expected[0])
    assert torch.equal(torch.autograd.grad(out, k, dout)[0], expected[2])
