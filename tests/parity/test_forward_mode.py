"""Forward mode is refused for each of q, k and v, in the same words in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import zigzag_jax
import zigzag_torch
from tests.support.machine import GPU

REFUSED = "expected first derivatives in reverse mode .* got forward mode .* or a second derivative"
Q, KV = (4, 2, 16), (8, 1, 16)


@pytest.fixture(params=["reference", "kernels"])
def backend(request, kernel_backend):
    return request.param if request.param == "reference" else kernel_backend


def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in (Q, KV, KV)]


def function_of_torch(backend, number):
    """Attention as a function of argument `number` alone, and that argument."""
    device = "cuda" if GPU else "cpu"
    inputs = [torch.tensor(x, device=device) for x in arrays()]
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32, device=device)

    def attend(x):
        qkv = [*inputs[:number], x, *inputs[number + 1 :]]
        return zigzag_torch.zigzag_attention_gathered(*qkv, cu_seqlens, 1, 2, backend=backend)

    return attend, inputs[number]


def function_of_jax(backend, number):
    """As `function_of_torch`."""
    inputs = [jnp.asarray(x) for x in arrays()]

    def attend(x):
        qkv = [*inputs[:number], x, *inputs[number + 1 :]]
        return zigzag_jax.zigzag_attention_gathered(*qkv, np.array([0, 8], np.int32), 1, 2, backend=backend)

    return attend, inputs[number]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use of it
@pytest.mark.parametrize("number", range(3), ids="qkv")
def test_forward_mode_of_torch_is_refused(number, backend):
    attend, x = function_of_torch(backend, number)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(attend, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REFUSED):
        attend(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():
        assert torch.equal(attend(x), attend(x.clone()))  # no tensor has a tangent


@pytest.mark.parametrize("number", range(3), ids="qkv")
def test_forward_mode_of_jax_is_refused(number, backend):
    attend, x = function_of_jax(backend, number)
    for function in (attend, jax.jit(attend)):
        with pytest.raises(NotImplementedError, match=REFUSED):
            jax.jvp(function, (x,), (x,))
    with pytest.raises(NotImplementedError, match=REFUSED):
        jax.jacfwd(attend)(x)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jacfwd(jax.jit(attend))(x)
