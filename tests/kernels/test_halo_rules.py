"""When calls that name no method take halos, and how many rows a message has."""

from dataclasses import dataclass

import pytest

from zigzag_kernels.batch_checks import check_halo
from zigzag_kernels.halo import (
    choose_method,
    message_rows,
    method_of_call,
    reach_of_mask,
    sizes_of_documents,
    sizes_of_rows,
)
from zigzag_kernels.modes import Method


@dataclass(frozen=True)
class Prepared:
    """Stands for the `Batch` of a front end."""

    method: str
    halo: int = 0
    max_seqlen: int = 0
    segments: str | None = "tables"
    sequences: str | None = "tables"


@pytest.mark.parametrize(
    ("mask", "max_seqlen", "rows"),
    [
        ((True, (5, 3), 0), 0, 5),
        ((False, (5, 0), 0), 0, 5),
        ((False, (5, 1), 0), 0, None),  # sees what is behind
        ((True, (-1, -1), 0), 0, None),
        ((True, (None, None), 8), 0, 7),
        ((True, (5, 0), 8), 4, 3),
        ((True, (0, 0), 0), 0, 1),  # tables need a row
    ],
)
def test_the_reach_is_the_smallest_limit_of_a_causal_mask(mask, max_seqlen, rows):
    assert reach_of_mask(*mask, max_seqlen) == rows


def test_halos_are_chosen_where_the_host_knows_that_they_serve_and_move_less():
    rows = sizes_of_rows(64, 3, 4)  # chunks of 8 tokens; 48 rows on each rank
    assert choose_method(8, rows, 4) is Method.HALO
    assert choose_method(9, rows, 4) is Method.ALLGATHER
    assert choose_method(None, rows, 4) is choose_method(8, None, 4) is choose_method(8, rows, 1) is Method.ALLGATHER
    two = sizes_of_rows(32, 1, 2)
    assert choose_method(7, two, 2) is Method.HALO
    assert choose_method(8, two, 2) is Method.ALLGATHER  # both neighbours' messages are as much as the other rank has


@pytest.mark.parametrize(("seen", "method"), [((4, 0), "halo"), ((5, 0), "allgather"), ((-1, -1), "allgather")])
def test_halos_of_a_prepared_batch_serve_calls_that_see_no_farther(seen, method):
    call = {"shape": (1, 24), "layout": "document", "world_size": 2, "heads_k_stride": None}
    halos, ring = Prepared("halo", 4), Prepared("ring")
    for causal in True, False:  # a window ends with its row all the same
        batch, chosen = method_of_call(halos, (causal, seen, 0), **call)
        assert chosen == batch.method == method
        assert batch is halos or batch == Prepared("allgather", segments=None, sequences=None)
    assert method_of_call(ring, (True, seen, 0), **call) == (ring, "ring")


def test_documents_that_end_before_their_third_chunk_limit_no_halo():
    sizes = sizes_of_documents([0, 64, 72, 72], [64, 2, 0], 4)
    assert sizes.shortest_chunk == 8
    assert choose_method(8, sizes, 4) is Method.HALO
    assert sizes_of_documents([0, 64, 72], None, 4).shortest_chunk == 1


def test_a_message_has_the_rows_of_all_documents_but_never_more_than_half_of_a_rank():
    assert message_rows(5, 100, 3, 0) == 15
    assert message_rows(50, 100, 3, 0) == 50
    assert message_rows(5, 100, 3, 2) == 10


def test_documents_on_the_host_are_checked():
    check_halo([0, 32, 36], [32, 2], 2, None, (8, 32))
    with pytest.raises(ValueError, match="max_seqlen: expected at least the 32 tokens of document 0, got 31"):
        check_halo([0, 32], None, 2, None, (8, 31))
    with pytest.raises(ValueError, match=r"chunks of at least the 9 rows of a halo, got 8 .*document 0 has 17"):
        check_halo([0, 32], [17], 2, None, (9, 0))
    with pytest.raises(ValueError, match="got 8 tokens in a chunk of a packed row"):
        check_halo([0, 3, 32], None, 2, 32, (9, 0))
