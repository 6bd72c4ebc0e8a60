"""The sums of the fused backward: the order of their columns, and the kernel that makes dQ of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import planned
from tests.support.device_code import in_numpy
from tests.support.machine import GPU
from tests.support.problems import hopper_problem, launches_of
from zigzag_kernels import plan
from zigzag_kernels.hopper.family import HOPPER
from zigzag_kernels.modes import Operation
from zigzag_kernels.segments.columns import SEGMENT_FIELDS


class Values(np.ndarray):
    """An array with the methods of a tensor that the kernel uses."""

    def permute(self, order):
        return self.transpose(order)


@pytest.mark.skipif(GPU, reason="needs the interpreter")
@pytest.mark.parametrize("head_dim", [128, 80])
def test_dq_has_its_own_order_of_columns_again(head_dim, monkeypatch):
    """Rows of the sums may be longer than rows of dQ."""
    from zigzag_kernels.hopper import sums as sums_of_dq

    tokens, heads, columns = 16, 32, -(-head_dim // 32) * 32
    monkeypatch.setenv(HOPPER.variable, "1")
    asked = hopper_problem(tokens, head_dim, world_size=1, deterministic=False)
    *_, finish = launches_of(asked, Operation.FUSED_BACKWARD)
    dq = np.random.default_rng(0).standard_normal((tokens * heads, columns)).astype("float32")
    sums = in_numpy(sums_of_dq.in_order_of_sums)(dq.view(Values))
    for j, h, x in ((0, 1, 2), (3, 0, 1), (2, 1, 3)):
        np.testing.assert_array_equal(sums[:, 32 + 16 * h + 4 * j + x], dq[:, 32 + 8 * j + 4 * h + x])
    segments = torch.zeros(finish.scalars["n_segments"], SEGMENT_FIELDS, dtype=torch.int32)
    (found,) = planned.interpret(finish, torch.tensor(sums.reshape(tokens, heads, columns)), segments, None)
    expected = dq.reshape(tokens, heads, columns)[..., :head_dim] * asked.call.softmax_scale
    np.testing.assert_allclose(found.float().numpy(), expected, rtol=2**-7)

    # A window of two KV heads has sums of its own, and writes its heads of dQ alone.
    window = replace(asked, window=2)
    *_, finish = launches_of(window, Operation.FUSED_BACKWARD, plan.Part(4, dtype="float32"))
    given = torch.full((tokens, heads, head_dim), 7.0, dtype=torch.bfloat16)
    of_window = sums.reshape(tokens, heads, columns)[:, 16:24].copy()
    (found,) = planned.interpret(finish, torch.tensor(of_window), segments, given)
    assert found is given
    np.testing.assert_allclose(found[:, 16:24].float().numpy(), expected[:, 16:24], rtol=2**-7)
    assert (found[:, :16] == 7).all()
    assert (found[:, 24:] == 7).all()
