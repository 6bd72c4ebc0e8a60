"""What PyTorch adds to the kernels: `torch.compile`, checkpointing, views, and operators."""

import pytest
import torch

import oracle
import zigzag_torch
from cases import Case, make_inputs
from conftest import GPU

DEVICE = "cuda" if GPU else "cpu"
CASE = Case(name="torch", world_size=2, lengths=(12, 0, 40), heads=4, kv_heads=2, padding=2)


def tensors(case=CASE, rank=1):
    """q, gathered k and v, dout of `rank`, and cu_seqlens."""
    inputs = make_inputs(case)
    rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
    gathered = oracle.gathered_rows(case.cu_seqlens, case.world_size, case.padding)
    arrays = inputs["q"][rows], inputs["k"][gathered], inputs["v"][gathered], inputs["dout"][rows]
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=DEVICE)
    return *(torch.tensor(x, dtype=getattr(torch, case.dtype), device=DEVICE) for x in arrays), cu_seqlens


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
def test_compiles_without_a_graph_break(attend):
    q, k, v, dout, cu_seqlens = tensors()

    def step(q, k, v):
        return attend(q * 2, k, v, cu_seqlens) * 0.5

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    assert_same(gradients(compiled, q, k, v, dout), gradients(step, q, k, v, dout))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiles_for_any_length(kernel_backend):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q, k, v, cu_seqlens):
        return zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, backend=kernel_backend)

    for tokens in (8, 13, 21):
        q, k, v = (torch.randn(tokens, heads, 16, device=DEVICE) for heads in (2, 1, 1))
        cu_seqlens = torch.tensor([0, 5, tokens], dtype=torch.int32, device=DEVICE)
        theirs = zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, backend=kernel_backend)
        assert torch.equal(compiled(q, k, v, cu_seqlens), theirs)


def test_operators_are_registered_as_torch_wants_them(kernel_backend):
    q, k, v, dout, cu_seqlens = tensors()
    rank = torch.ones(1, dtype=torch.int32, device=DEVICE)
    table_arguments = cu_seqlens, rank, 2, "gathered", kernel_backend
    tables = torch.ops.zigzag.segment_tables(*table_arguments)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.zigzag.segment_tables, table_arguments, test_utils=tests)
    constants = (2, True, 0.25, kernel_backend, "gathered", False)
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
    q, k, v, dout, cu_seqlens = tensors()
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
    q, k, v, _, cu_seqlens = tensors()
    q.requires_grad_()
    _, lse = attend(q, k, v, cu_seqlens, return_lse=True)
    (ours,) = torch.autograd.grad(lse[lse.isfinite()].sum(), q)
    _, lse = zigzag_torch.zigzag_attention_gathered(q, k, v, cu_seqlens, 1, 2, return_lse=True, backend="reference")
    (theirs,) = torch.autograd.grad(lse[lse.isfinite()].sum(), q)
    torch.testing.assert_close(ours, theirs)


def test_equal_lengths_as_a_batch_dimension(kernel_backend):
    q, k, v = (torch.randn(3, 10, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    out, lse = zigzag_torch.zigzag_attention(q, k, v, return_lse=True, backend=kernel_backend)
    assert out.shape == q.shape
    assert lse.shape == (3, 4, 10)
    for i in range(3):
        one, one_lse = zigzag_torch.zigzag_attention(q[i], k[i], v[i], return_lse=True, backend=kernel_backend)
        assert torch.equal(out[i], one)
        assert torch.equal(lse[i], one_lse)


def test_one_backward_equals_another(attend):
    q, k, v, dout, cu_seqlens = tensors()
    first = gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout)
    for _ in range(50 if GPU else 2):
        assert_same(gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout), first)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the operators one by one
def test_the_operator_and_vmap_give_the_gradients_of_an_eager_call(attend, kernel_backend):
    q, k, v, dout, cu_seqlens = tensors()
    expected = gradients(lambda *qkv: attend(*qkv, cu_seqlens), q, k, v, dout)
    batch = zigzag_torch.prepare_batch(cu_seqlens, 1, 2, backend=kernel_backend)
    constants = batch.segments, batch.sequences, 2, True, q.shape[-1] ** -0.5, kernel_backend
    operator = lambda *qkv: torch.ops.zigzag.attention_forward(*qkv, *constants)[0]  # noqa: E731
    assert_same(gradients(operator, q, k, v, dout), expected)
    vmapped = torch.func.vmap(lambda *qkv: attend(*qkv, batch))
    twice = [torch.stack([x, 2 * x]) for x in (q, k, v, dout)]
    assert_same([x[0] for x in gradients(vmapped, *twice)], expected)
