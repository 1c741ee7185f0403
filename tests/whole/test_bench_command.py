"""`dist-qft bench`: what it refuses, and each benchmark in small; real processes on a model of three layers."""

import json

import pytest

from dist_qft.bench.command import BENCHMARKS
from tests.support.commands import Command

NAMES = "step, loading, frozen-layer, all-reduce, merge, scaling, mixture, nodes"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The reports of all benchmarks by name, and what they printed."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_QFT_CACHE", str(folder))
        with Command("bench", "--all", "--quick", "--json", folder / "all.jsonl") as command:
            done = command.finish(seconds=1800)
    assert done.code == 0, done.err
    reports = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    assert [report["benchmark"] for report in reports] == list(BENCHMARKS)
    return {report["benchmark"]: report for report in reports}, done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], f"bench: got 'nothing', must be one of {NAMES}"),
        ([], f"bench: needs a NAME or --all; names: {NAMES}"),
        (["step", "--all"], "bench: got 'step' and --all, which has every benchmark; leave one out"),
        (["step", "--device", "tpu"], "--device: got 'tpu', must be cpu or cuda"),
        (["step", "--precision", "fp8"], "--precision: got 'fp8', must be float32, bfloat16 or auto"),
        (["step", "--json", "/nowhere/x.jsonl"], "--json: there is no folder '/nowhere'"),
    ],
)
def test_refusals_are_one_line(shell, words, message):
    assert shell("bench", *words) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_in_small(bench, name):
    reports, out = bench
    report = reports[name]
    ours = [side for side in report["sides"] if "PEFT" not in side["name"]]
    assert [side["error"] for side in ours] == [None] * len(ours)
    # One rank sends nothing; three small layers fit into memory that the process has to spare.
    may_be_zero = {"wire_bytes", "counted_bytes", "bound_bytes", "peak_bytes", "held_bytes", "training_peak_bytes"}
    assert all(value > 0 for side in ours for key, value in side["metrics"].items() if key not in may_be_zero)
    assert all(row["ours"] is not None for row in report["comparisons"])
    assert f"{name}: compared" in out
    if name == "nodes" and report["sides"]:
        # Sharded in each node, only the gradients cross the link between the nodes.
        (link,) = [row["ratio"] for row in report["comparisons"] if row["what"].startswith("link MB")]
        assert 1.0 <= link < 1.02
    if name == "step":
        # At the network interface, headers and barriers included: the stated lower bound and next to nothing more.
        (wire,) = [row["ratio"] for row in report["comparisons"] if row["what"].startswith("wire MB")]
        assert 1.0 <= wire < 1.03
        assert all(side["metrics"]["share_of_ceiling"] > 0 for side in report["sides"])
        assert report["settings"]["precision"] == "float32"
