"""The history of a run on disk: cut back to the checkpoint it goes on from, and readable as numbers."""

import hashlib
import json
import math
from pathlib import Path

import pytest

from dist_qft.training.metrics_file import METRICS_FILE, MetricsFile, StepRecord, read_held_out, read_history


def record(step: int, loss: float = 1.0) -> dict[str, float]:
    return {"step": step, "train/loss": loss, "train/learning_rate": 0.1, "train/grad_norm": 2.0}


def written(path: Path) -> list[tuple[int, list[str]]]:
    """Step and other keys of every line."""
    return [(line.pop("step"), list(line)) for line in map(json.loads, path.read_text().splitlines())]


@pytest.fixture
def interrupted(tmp_path) -> tuple[Path, int]:
    """A file of a run that was saved after step 2, evaluated there, and killed in the midst of step 4's line.

    Also its size when it was saved.
    """
    path = tmp_path / METRICS_FILE
    file = MetricsFile(path, 0, 0)
    for step in (1, 2):
        file.write(record(step))
    file.write({"step": 2, "eval/loss": 1.5})
    size = file.size
    file.write({"step": 2, "eval/loss": 1.5, "after": "the save"})
    file.write(record(3))
    file.close()
    with open(path, "ab") as end:
        end.write(b'{"step": 4, "train/lo')
    return path, size


def test_a_resumed_file_goes_on_where_the_checkpoint_was_written(interrupted):
    path, size = interrupted
    before = path.read_bytes()[:size]
    file = MetricsFile(path, 2, size)
    file.write(record(3, 0.5))
    file.close()
    assert path.read_bytes().startswith(before) and len(path.read_bytes()) > size
    assert [step for step, _ in written(path)] == [1, 2, 2, 3]
    assert read_history(path.parent)[-1] == StepRecord(3, 0.5, 0.1, 2.0)


@pytest.mark.parametrize("size", [0, 1, 10**9, "one less"])
def test_without_a_fitting_size_lines_are_chosen_by_their_step(interrupted, size):
    """As for a checkpoint that does not know it, or a file that was edited."""
    path, right = interrupted
    MetricsFile(path, 2, right - 1 if size == "one less" else size).close()
    assert [step for step, _ in written(path)] == [1, 2, 2, 2]


def test_a_size_of_later_steps_is_not_believed(interrupted):
    path, _ = interrupted
    beyond = path.read_bytes().index(b'{"step": 4')
    MetricsFile(path, 2, beyond).close()
    assert [step for step, _ in written(path)] == [1, 2, 2, 2]


def test_a_fresh_run_begins_anew_and_another_folder_has_no_history(interrupted, tmp_path):
    path, _ = interrupted
    MetricsFile(path, 0, 0).close()
    assert path.read_bytes() == b""
    assert read_history(path.parent) == [] == read_history(tmp_path / "absent")
    (tmp_path / "new").mkdir()
    MetricsFile(tmp_path / "new" / METRICS_FILE, 5, 100).close()
    assert (tmp_path / "new" / METRICS_FILE).read_bytes() == b""


def test_damaged_lines_are_left_out_of_the_history(interrupted):
    path, _ = interrupted
    before = read_history(path.parent)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [
        b'{"step": 1, "train/loss": 1.0}\n',
        b'{"step": 1, "train/loss": "1", "train/learning_rate": 0, "train/grad_norm": 0}\n',
        b'{"step": 1, "train/loss": 1, "train/learning_rate": 0, "train/grad_norm": 0, "train/target_tokens": []}\n',
        b'{"step": 1, "train/lo\n',
        b"\xff\x00\n[1]\n",
    ]
    path.write_bytes(b"".join([lines[0], *damaged, *lines[1:]]))
    assert read_history(path.parent) == before


def test_lines_are_valid_json_whatever_the_numbers(tmp_path):
    file = MetricsFile(tmp_path / METRICS_FILE, 0, 0)
    file.write({"step": 1, "eval/loss": math.nan, "memory": math.inf, "answer": "a\nb"})
    file.close()
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "eval/loss": None, "memory": None, "answer": "a\nb"}


@pytest.fixture
def saved(interrupted) -> tuple[Path, int, str]:
    """The interrupted file with its size and digest when it was saved."""
    path, size = interrupted
    return path, size, hashlib.sha256(path.read_bytes()[:size]).hexdigest()


def test_the_digest_goes_on_over_a_resume(saved):
    path, size, digest = saved
    file = MetricsFile(path, 2, size, digest)
    assert (file.fault, file.size, file.digest) == (None, size, digest)
    file.write(record(3))
    file.close()
    assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["edited", "truncated", "deleted"])
def test_a_history_that_is_not_the_saved_one_is_told(saved, damage):
    path, size, digest = saved
    match damage:
        case "edited":
            path.write_bytes(path.read_bytes().replace(b'"train/loss": 1.0', b'"train/loss": 0.5', 1))
        case "truncated":
            path.write_bytes(path.read_bytes()[: size - 9])
        case "deleted":
            path.unlink()
    file = MetricsFile(path, 2, size, digest)
    file.close()
    assert METRICS_FILE in file.fault
    kept = [] if damage == "deleted" else [1, 2] if damage == "truncated" else [1, 2, 2, 2]
    assert [step for step, _ in written(path)] == kept
    assert MetricsFile(path, 2, 0).fault is None  # a checkpoint of an earlier version knows nothing of the file


def test_a_step_that_is_evaluated_again_is_there_once(tmp_path):
    file = MetricsFile(tmp_path / METRICS_FILE, 0, 0)
    for step, loss in ((2, 1.5), (4, 1.25), (4, 1.25), (6, math.nan)):
        file.write({"step": step, "eval/loss": loss})
    file.close()
    assert read_held_out(tmp_path) == [(2, 1.5), (4, 1.25)]
