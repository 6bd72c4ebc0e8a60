"""The benchmark between GPUs: what it makes of times and timelines, and a tiny run of each framework."""

import argparse
import json

import pytest

from bench import arguments
from bench.scaling import run as scaling
from bench.scaling import ways
from tests.support.cases import Case
from tests.support.commands import finish, start
from tests.support.machine import GPU, GPUS

TINY = "--tokens", "32", "--rounds", "1"
# The batches of a tiny run, and how many ways there are in each, one GPU's share included. JAX compiles two programs
# for each way and direction, and does without the strides of one sequence.
BATCHES = {"torch": (["one sequence", "documents"], (6, 3, 4)), "jax": (["one sequence, window", "documents"], (3, 4))}


def test_communication_beside_attention():
    """1 to 3 is half beside attention that others overlap and touch, 5 to 6 wholly, 8 to 9 not."""
    kernels = [
        ("ncclDevKernel_AllGather", 1.0, 3.0),
        ("attention_forward", 2.0, 4.0),
        ("backward_dkdv", 3.5, 5.5),
        ("backward_dq", 5.5, 6.5),
        ("clear_sums", 6.5, 6.75),
        ("finish_dq", 6.75, 7.0),
        ("ncclDevKernel_SendRecv", 5.0, 6.0),
        ("memset", 7.0, 9.0),
        ("ncclDevKernel_SendRecv", 8.0, 9.0),
    ]
    assert scaling.overlap(kernels) == {
        "step_ms": 8.0,
        "attention_ms": 5.0,
        "communication_ms": 4.0,
        "beside_attention": 0.5,
    }
    assert scaling.overlap(kernels[1:2]) is None


def test_predictions_are_made_for_every_way_at_the_measured_rate():
    """A GPU that is slower waits less for its links; no rank waits for whole documents."""
    for workload in scaling.workloads(2, 8192, 65536, 1):
        assert ways.ALONE not in workload.ways
        fast, slow = (ways.predictions(workload.case, workload.ways, (ms, 3.5 * ms)) for ms in (1.0, 100.0))
        assert fast.keys() == {(way, i) for way in workload.ways for i in range(2)}
        for key, share in fast.items():
            assert 0 < share <= slow[key] + 1e-9 <= 1 + 2e-9
        if ways.PLANNED in workload.ways:
            assert fast[ways.PLANNED, 0] > fast[workload.ways[0], 0]  # all of them split, and gathered
            assert ways.plan_of(workload.case.lengths, 2).tokens > workload.case.tokens


def test_documents_fill_the_batch():
    lengths = scaling.document_lengths(100_000, 16)
    assert sum(lengths) == 100_000
    assert all(length > 0 and length % 16 == 0 for length in lengths)
    assert len(set(lengths)) > 10


@pytest.mark.multigpu
def test_a_wrong_result_is_not_timed():
    from bench.scaling import jax_ranks

    ranks = jax_ranks.Ranks()
    ranks.load(Case(name="tiny", world_size=ranks.size, lengths=(16 * ranks.size,), heads=4, kv_heads=2))
    forward, both = ranks.calls(("ring", None))
    ranks.check("ring", forward, both)
    steps, zero = ranks.record(both)()
    ranks.check("ring, the last of several steps", forward, lambda: steps)
    assert zero == 0
    with pytest.raises(AssertionError, match="rank 0, ring: out is off"):
        ranks.check("ring", lambda: forward()[::-1], both)
    dq, dk, dv, _ = both()
    with pytest.raises(AssertionError, match="ring: dk is off"):
        ranks.check("ring", forward, lambda: (dq, dv, dk))


@pytest.mark.multigpu
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_tiny_run(framework, forks, tmp_path):
    settings = {"JAX_NUM_CPU_DEVICES": "2", "NPROC": "16", "OMP_NUM_THREADS": "1"}
    settings |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ranks = len(GPUS) or 2
    files = "--json", str(tmp_path / "measured.json"), "--trace", str(tmp_path / "traces")
    names, counts = BATCHES[framework]
    command = "bench/scaling/run.py", "--framework", framework, *TINY, *files, "--only", *names
    # JAX reads its settings when it is imported.
    ended = finish(start(*command, **settings)) if framework == "jax" else forks.run(*command, ranks=ranks, **settings)
    assert [code for code, *_ in ended] == [0] * len(ended), ended
    printed = [line for _, lines, _ in ended for line in lines]
    assert any(line.startswith("| one sequence, window of 16, 32 tokens a GPU | halo |") for line in printed)
    assert any(line.startswith("| documents, 32 tokens a GPU | plan of documents |") for line in printed)
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["versions"]["ranks"] == ranks
    rows = {(row["workload"], row["method"], row["heads_k_stride"], row["direction"]): row for row in measured["rows"]}
    assert len(rows) == len(measured["rows"]) == 2 * sum(counts)
    for (workload, *_, direction), row in rows.items():
        alone = rows[workload, *scaling.ALONE, direction]
        assert row["efficiency"] == pytest.approx(alone["ms"] / row["ms"])
        assert row["call_ms"] > 0
        assert (row["predicted"] is None) == (row["method"] == ways.ALONE[0])
    assert len(list((tmp_path / "traces").iterdir())) == counts[0] - 1
    assert len(measured["timelines"]) == (counts[0] - 1 if GPU else 0)
    for timeline in measured["timelines"]:
        assert 0 <= timeline["beside_attention"] <= 1
        assert 0 < timeline["communication_ms"] <= timeline["step_ms"]


def test_batches_are_chosen_by_the_beginning_of_their_names():
    batches = scaling.workloads(2, 64, 64, 1)
    assert [x.case.name for x in scaling.chosen(batches, ["one l", "doc"])] == ["documents", "one long sequence"]
    assert scaling.chosen(batches, [""]) == batches
    with pytest.raises(SystemExit, match="--only: 'nobody' begins none of one sequence, 64 tokens a GPU; one sequence"):
        scaling.chosen(batches, ["documents", "nobody"])


def test_arguments_are_checked_before_anything_is_measured(tmp_path):
    assert arguments.positive("3") == 3
    assert arguments.new_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    for take, wrong, message in (
        (arguments.positive, "0", "expected a whole number of at least 1, got '0'"),
        (arguments.positive, "-8", "expected a whole number of at least 1, got '-8'"),
        (arguments.positive, "1.5", "expected a whole number of at least 1, got '1.5'"),
        (arguments.new_file, str(tmp_path), "expected a file in a folder that exists"),
        (arguments.new_file, str(tmp_path / "no" / "new.json"), "expected a file in a folder that exists"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            take(wrong)
