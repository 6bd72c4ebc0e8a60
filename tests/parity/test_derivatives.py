"""Every transform that asks for derivatives, on every backend: the right gradient, or one refusal in the same words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch._dynamo.compiled_autograd
from torch.autograd import forward_ad

import zigzag_jax
import zigzag_torch
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_kernels.derivatives import UNSUPPORTED_DERIVATIVE

pytestmark = pytest.mark.usefixtures("each_launch_once")  # transforms launch the same kernels on the same arrays
CU_SEQLENS = [0, 8, 12]
TOKENS = 12


def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((TOKENS, heads, 16), np.float32) for heads in (2, 1, 1)]


def torch_transforms(loss, q):
    """{name: function} for `loss(q)`, a scalar: (those that give the gradient of q, those that are refused)."""
    func = torch.func

    def recorded(**options):
        leaf = q.clone().requires_grad_()
        return leaf, torch.autograd.grad(loss(leaf), leaf, **options)[0]

    def compiled_autograd():
        leaf = q.clone().requires_grad_()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss(leaf).backward()
        return leaf.grad

    def dual():
        with forward_ad.dual_level():
            loss(forward_ad.make_dual(q, q))

    def twice():
        leaf, gradient = recorded(create_graph=True)
        torch.autograd.grad(gradient.sum(), leaf)

    right = {
        "backward": lambda: recorded()[1],
        "create_graph": lambda: recorded(create_graph=True)[1].detach(),
        "grad": lambda: func.grad(loss)(q),
        "vjp": lambda: func.vjp(loss, q)[1](torch.ones_like(loss(q)))[0],
        "jacrev": lambda: func.jacrev(loss)(q),
        "vmap(grad)": lambda: func.vmap(func.grad(loss))(q[None])[0],
        "grad(vmap)": lambda: func.grad(lambda x: func.vmap(loss)(x).sum())(q[None])[0],
        "compiled autograd": compiled_autograd,
    }
    refused = {
        "dual": dual,
        "jvp": lambda: func.jvp(loss, (q,), (q,)),
        "jacfwd": lambda: func.jacfwd(loss)(q),
        "linearize": lambda: func.linearize(loss, q)[1](q),
        "jvp(vmap)": lambda: func.jvp(func.vmap(loss), (q[None],), (q[None],)),
        "vmap(jvp)": lambda: func.vmap(lambda x: func.jvp(loss, (x,), (x,))[1])(q[None]),
        "hvp": lambda: func.jvp(func.grad(loss), (q,), (q,)),
        "hessian": lambda: func.hessian(loss)(q),
        "grad(grad)": lambda: func.grad(lambda x: func.grad(loss)(x).sum())(q),
        "twice": twice,
    }
    return right, refused


def jax_transforms(loss, q):
    """As `torch_transforms`."""
    jvp = lambda x: jax.jvp(loss, (x,), (x,))[1]  # noqa: E731
    second = lambda x: jax.grad(loss)(x).sum()  # noqa: E731
    right = {
        "grad": lambda: jax.grad(loss)(q),
        "jit(grad)": lambda: jax.jit(jax.grad(loss))(q),
        "grad(jit)": lambda: jax.grad(jax.jit(loss))(q),
        "vjp": lambda: jax.vjp(loss, q)[1](jnp.ones(()))[0],
        "jacrev": lambda: jax.jacrev(loss)(q),
        "grad(checkpoint)": lambda: jax.grad(jax.checkpoint(loss))(q),
        "vmap(grad)": lambda: jax.vmap(jax.grad(loss))(q[None])[0],
        "grad(vmap)": lambda: jax.grad(lambda x: jax.vmap(loss)(x).sum())(q[None])[0],
    }
    refused = {
        "jvp": lambda: jvp(q),
        "jit(jvp)": lambda: jax.jit(jvp)(q),
        "jvp(jit)": lambda: jax.jvp(jax.jit(loss), (q,), (q,)),
        "jacfwd": lambda: jax.jacfwd(loss)(q),
        "linearize": lambda: jax.linearize(loss, q)[1](q),
        "vmap(jvp)": lambda: jax.vmap(jvp)(q[None]),
        "hvp": lambda: jax.jvp(jax.grad(loss), (q,), (q,)),
        "hessian": lambda: jax.hessian(loss)(q),
        "grad(jvp)": lambda: jax.grad(jvp)(q),
        "grad(grad)": lambda: jax.grad(second)(q),
        "jit(grad(grad))": lambda: jax.jit(jax.grad(second))(q),
    }
    return right, refused


def compiled_jax_transforms(loss, x):
    """As `jax_transforms` where operations one by one take long.

    Of a jitted function JAX refuses a few transforms by itself, in words of its own: these are of `loss` as it is.
    """
    right, refused = jax_transforms(jax.jit(loss), x)
    eager = jax_transforms(loss, x)[1]
    return right, refused | {name: eager[name] for name in ("jvp", "jacfwd", "vmap(jvp)", "grad(jvp)")}


def check(where, transforms, expected, close):
    right, refused = transforms
    for name, transform in right.items():
        close(transform(), expected, f"{where}: {name}")
    for name, transform in refused.items():
        refusal = "no refusal"
        try:
            transform()
        except NotImplementedError as error:
            refusal = str(error)
        assert UNSUPPORTED_DERIVATIVE in refusal, f"{where}: {name}: {refusal}"


def torch_close(ours, theirs, where):
    np.testing.assert_allclose(ours.detach().cpu(), theirs, atol=1e-4, err_msg=where)


def torch_loss(backend, k, v, cu_seqlens, **options):
    def loss(q):
        return zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, backend=backend, **options).square().sum()

    return loss


@functools.cache
def whole_gradient():
    """The gradient of q by the reference of JAX."""
    q, k, v = map(jnp.asarray, arrays())
    return np.asarray(jax.grad(jax_loss("reference", k, v))(q))


def jax_loss(backend, k, v, attend=zigzag_jax.zigzag_attention):
    cu_seqlens = np.array(CU_SEQLENS, np.int32)
    return lambda q: (attend(q, k, v, cu_seqlens, backend=backend) ** 2).sum()


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_torch_on_one_device(kernels, kernel_backend):
    backend = kernel_backend if kernels else "reference"
    q, k, v = (torch.tensor(x, device="cuda" if GPU else "cpu") for x in arrays())
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=q.device)
    loss = torch_loss(backend, k, v, cu_seqlens)
    check(backend, torch_transforms(loss, q), whole_gradient(), torch_close)


@pytest.mark.parametrize("kernels", [pytest.param(False, marks=pytest.mark.slow), True], ids=["reference", "kernels"])
def test_jax_on_one_device(kernels, kernel_backend):
    backend = kernel_backend if kernels else "reference"
    q, k, v = map(jnp.asarray, arrays())
    check(backend, jax_transforms(jax_loss(backend, k, v), q), whole_gradient(), jax_close)


SINKS = np.array([0.5, -1.0], np.float32)


@functools.cache
def gradient_of_sinks():
    """That of the squares of out for all of `arrays`, by the reference of JAX."""
    q, k, v = map(jnp.asarray, arrays())
    return np.asarray(jax.grad(jax_loss_of_sinks("reference", q, k, v))(jnp.asarray(SINKS)))


def jax_loss_of_sinks(backend, q, k, v):
    cu_seqlens = np.array(CU_SEQLENS, np.int32)
    return lambda sinks: (zigzag_jax.zigzag_attention(q, k, v, cu_seqlens, sinks=sinks, backend=backend) ** 2).sum()


@pytest.mark.parametrize("kernels", [pytest.param(False, marks=pytest.mark.slow), True], ids=["reference", "kernels"])
def test_sinks_of_jax(kernels, kernel_backend):
    backend = kernel_backend if kernels else "reference"
    loss = jax_loss_of_sinks(backend, *map(jnp.asarray, arrays()))
    transforms = jax_transforms if kernels else compiled_jax_transforms
    check(backend, transforms(loss, jnp.asarray(SINKS)), gradient_of_sinks(), jax_close)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_sinks_of_torch(kernels, kernel_backend):
    backend = kernel_backend if kernels else "reference"
    q, k, v, sinks = (torch.tensor(x, device="cuda" if GPU else "cpu") for x in (*arrays(), SINKS))
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=q.device)

    def loss(sinks):
        return zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, sinks=sinks, backend=backend).square().sum()

    check(backend, torch_transforms(loss, sinks), gradient_of_sinks(), torch_close)


def jax_close(ours, theirs, where):
    np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=where)


@pytest.mark.multigpu
@pytest.mark.parametrize("method", ["allgather", pytest.param("ring", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernels", [pytest.param(False, marks=pytest.mark.slow), True], ids=["reference", "kernels"])
def test_jax_between_ranks(method, kernels, kernel_backend):
    backend = kernel_backend if kernels else "reference"
    mesh = jax.make_mesh((2,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    attend = zigzag_jax.make_zigzag_attention(mesh, method=method, backend=backend)
    q, k, v = (jnp.asarray(x) for x in arrays())
    order = np.concatenate([zigzag_jax.shard(jnp.arange(TOKENS), np.array(CU_SEQLENS), r, 2) for r in range(2)])
    loss = jax_loss(backend, k[order], v[order], lambda *qkv, backend: attend(*qkv))
    check(f"{method}, {backend}", compiled_jax_transforms(loss, q[order]), whole_gradient()[order], jax_close)


def check_group(rank, world_size, expected, calls):
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    q, k, v = (zigzag_torch.shard(torch.tensor(x), cu_seqlens, rank, world_size) for x in arrays())
    expected = zigzag_torch.shard(torch.tensor(expected), cu_seqlens, rank, world_size).numpy()
    options = {"group": torch.distributed.group.WORLD}
    for method, backend in calls:
        batch = zigzag_torch.prepare_batch(cu_seqlens, **options, method=method, backend=backend)
        loss = torch_loss(backend, k, v, batch, **options, method=method)
        check(f"{method}, {backend}", torch_transforms(loss, q), expected, torch_close)


CALLS = {
    "kernels gather": (("allgather", "interpret"), ("ring", "reference")),
    "kernels in a ring": (("allgather", "reference"), ("ring", "interpret")),
}


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
def test_torch_between_ranks(calls, tmp_path):
    run_ranks(2, tmp_path, check_group, whole_gradient(), calls)
