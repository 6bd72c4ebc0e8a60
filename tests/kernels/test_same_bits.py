"""Results of a document have the same bits whatever the world size, the layout and the other documents of its batch."""

import pytest

from tests.programs import same_bits
from tests.support.machine import GPU

PACKINGS = range(100) if GPU else range(2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", PACKINGS)
def test_a_documents_bits_do_not_depend_on_how_its_batch_is_dealt_out(seed):
    assert same_bits.differences(seed, longest=300 if GPU else 40) == []


def test_one_bit_is_a_difference(monkeypatch):
    """The comparison above can fail: a row that is rounded otherwise is found."""
    attend, calls = same_bits.attend, []

    def with_one_bit(*arguments):
        calls.append(arguments)
        results = attend(*arguments)
        if len(calls) == 2:
            out, *others = results[0]
            out[0, 0, 0] += out[0, 0, 0].abs() * 2**-7
            results[0] = out, *others
        return results

    monkeypatch.setattr(same_bits, "attend", with_one_bit)
    monkeypatch.setattr(same_bits, "WORLD_SIZES", (1,))
    (found,) = same_bits.differences(0, longest=20)
    assert "document 0: out" in found
