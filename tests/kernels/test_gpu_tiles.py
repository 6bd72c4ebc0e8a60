"""The portable kernels with a GPU's tiles, in the interpreter, whose own tiles are too small for some faults."""

import pytest

from tests.support import planned
from tests.support.cases import Case, make_inputs
from tests.support.machine import GPU
from tests.support.rank import assert_rank_is_right

pytestmark = pytest.mark.skipif(GPU, reason="this process compiles: the cases for GPUs have these tiles")


@pytest.mark.parametrize(("chunks", "head_dim"), [((41, 47), 16), ((55,), 72)], ids=["blocks-64", "blocks-128"])
def test_key_blocks_that_cross_chunks_bring_the_right_keys_with_the_tiles_of_a_gpu(chunks, head_dim):
    """In float32 `n * (1 / n)` is less than 1 for these lengths of chunks: a key's chunk must not be rounded down."""
    case = Case(
        name="crossing", world_size=3, lengths=tuple(6 * n for n in chunks), heads=1, head_dim=head_dim,
        dtype="float16", padding=2,  # where a key too far on would be written
    )  # fmt: skip
    inputs = make_inputs(case)
    results = planned.attend(*planned.rank_tensors(case, inputs, 0), case.cu_seqlens, 0, 3, target="9.0")
    assert_rank_is_right(case, inputs, 0, {"kernels": results})


def test_a_batch_of_seventy_sequences_matches_the_oracle():
    """More entries than the builder of the tables looks at together, which is 64, two a sequence."""
    lengths = tuple(4 * (5 * i % 4) for i in range(70))
    case = Case(name="seventy", world_size=2, lengths=lengths, heads=1, padding=1)
    inputs = make_inputs(case)
    results = planned.attend(*planned.rank_tensors(case, inputs, 1), case.cu_seqlens, 1, 2, target="9.0")
    assert_rank_is_right(case, inputs, 1, {"kernels": results})
