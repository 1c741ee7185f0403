"""Checkpoints on a disk that fails: torn, altered, full, hostile."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_qft.errors import CorruptFileError, SetupError, UserError
from dist_qft.storage.checkpoint import (
    ADAPTER_MODEL,
    OPTIMIZER,
    TRAINER_STATE,
    Checkpoint,
    fault_in,
    list_checkpoints,
    newest_valid,
    prune,
    read_checkpoint,
    require_checkpoint_space,
    require_writable,
    write_checkpoint,
)
from dist_qft.storage.manifest import MANIFEST
from dist_qft.storage.trainer_state import TrainerState
from dist_qft.training.resume import choose_checkpoint
from tests.support.checkpoints import FILES, flip_a_bit
from tests.support.checkpoints import save_small_checkpoint as save


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def test_what_is_written_is_what_is_read(tmp_path):
    flat = torch.arange(10.0)
    values = torch.nn.Parameter(flat[4:].view(2, 3))  # a view into a flat buffer, as the trainables are
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.tensor([float("nan"), -0.0, float("inf")])}
    state = TrainerState(step=7, last_loss=0.1 + 0.2, history_digest="ab", config={"train": {"weight": 1e-300}})
    config, path = {"peft_type": "DIST_QFT_TILE"}, tmp_path / "checkpoint-7"
    write_checkpoint(Checkpoint(path, config, {"layer.A": values}, moments, state))
    found = read_checkpoint(path)
    assert (found.path, found.adapter_config, found.state) == (path, config, state)
    assert torch.equal(found.trainables["layer.A"], flat[4:].view(2, 3))
    assert {key: tensor.view(torch.int32).tolist() for key, tensor in found.optimizer.items()} == {
        key: tensor.view(torch.int32).tolist() for key, tensor in moments.items()
    }


def test_the_manifest_lists_size_and_sha256_of_every_other_file(run_dir):
    folder = run_dir / "checkpoint-2"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest == {
        "version": 1,
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in folder.iterdir()
            if path.name != MANIFEST
        },
    }
    assert sorted(manifest["files"]) == sorted(FILES)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_truncation_is_refused_and_names_the_file(run_dir, name):
    path = run_dir / "checkpoint-2" / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(path)
    path.write_bytes(whole + b" ")
    assert_refused(path)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_bit_is_refused_and_names_the_file(run_dir, name):
    path = run_dir / "checkpoint-2" / name
    whole = path.read_bytes()
    for bit in random.Random(name).sample(range(8 * len(whole)), 300):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        # A flip inside the manifest may as well show as a file that is not what it says.
        assert_refused(path, exactly=name != MANIFEST)


def assert_refused(path: Path, exactly: bool = True) -> None:
    with pytest.raises(CorruptFileError) as refusal:
        read_checkpoint(path.parent)
    assert refusal.value.exit_code == 5
    message = str(refusal.value)
    assert message.startswith(f"{path.parent}: {path.name if exactly else ''}"), message
    assert any(name in message for name in (*FILES, MANIFEST)), message
    assert "\n" not in message


def test_mixed_up_and_missing_files_are_refused(run_dir):
    one, two = run_dir / "checkpoint-1", run_dir / "checkpoint-2"
    for name in FILES:
        ours, theirs = (two / name).read_bytes(), (one / name).read_bytes()
        if ours != theirs:
            (two / name).write_bytes(theirs)
            assert fault_in(two).startswith(f"{name}: ")
        (two / name).unlink()
        assert fault_in(two) == f"{name}: no such file"
        (two / name).symlink_to("/dev/zero")
        assert fault_in(two) == f"{name}: no such file", "a device that never ends is no file"
        (two / name).unlink()
        os.mkfifo(two / name)
        assert fault_in(two) == f"{name}: no such file", "nor is a pipe that nobody fills"
        (two / name).unlink()
        (two / name).write_bytes(ours)
        assert fault_in(two) is None
    (two / MANIFEST).write_bytes((one / MANIFEST).read_bytes())
    assert fault_in(two) is not None
    (two / MANIFEST).unlink()
    assert fault_in(two) == f"{MANIFEST}: No such file or directory"


@pytest.mark.parametrize("name", ["../checkpoint-1/secret", "/etc/passwd", "..", ".", "", "a\0b", "x" * 5000, "extra"])
def test_a_manifest_that_points_elsewhere_is_refused(run_dir, name):
    path = run_dir / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    assert fault_in(path.parent) in (f"{MANIFEST}: lists {name!r}", f"{MANIFEST}: altered since it was written")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"version": 2, "files": {}}',
        b'{"version": 1}',
        b'{"version": 1, "files": {"a": {"size": 1e999, "sha256": "x"}}}',
        b'{"version": 1, "files": []}',
    ],
)
def test_a_manifest_of_another_kind_is_refused(run_dir, content):
    (run_dir / "checkpoint-2" / MANIFEST).write_bytes(content)
    assert fault_in(run_dir / "checkpoint-2") == f"{MANIFEST}: not a manifest of this version"


def test_resume_auto_takes_the_newest_good_one_and_tells_of_each_refused_one(run_dir):
    for step in (3, 10):
        save(run_dir, step)
        flip_a_bit(run_dir / f"checkpoint-{step}" / ADAPTER_MODEL)
    (run_dir / "checkpoint-99").mkdir()
    path, refused = newest_valid(run_dir)
    assert path == run_dir / "checkpoint-2"
    assert [line.split(": ")[:3] for line in refused] == [
        [str(run_dir / "checkpoint-99"), "refused", MANIFEST],
        [str(run_dir / "checkpoint-10"), "refused", ADAPTER_MODEL],
        [str(run_dir / "checkpoint-3"), "refused", ADAPTER_MODEL],
    ]
    checkpoint, notes = choose_checkpoint(run_dir, "auto")
    assert (checkpoint.state.step, notes) == (2, refused)
    for step in (1, 2):
        flip_a_bit(run_dir / f"checkpoint-{step}" / TRAINER_STATE)
    with pytest.raises(CorruptFileError, match=r"no checkpoint in .* verifies: .*checkpoint-99: refused") as refusal:
        choose_checkpoint(run_dir, "auto")
    assert refusal.value.exit_code == 5
    with pytest.raises(CorruptFileError, match=f"checkpoint-3: {ADAPTER_MODEL}: SHA-256"):
        choose_checkpoint(run_dir, str(run_dir / "checkpoint-3"))


def test_pruning_keeps_valid_ones_and_does_not_count_torn_ones(run_dir):
    for step in range(3, 9):
        save(run_dir, step)
    for step in (1, 5, 7, 8):
        flip_a_bit(run_dir / f"checkpoint-{step}" / OPTIMIZER)
    prune(run_dir, keep=2)
    assert [path.name for path in list_checkpoints(run_dir)] == [f"checkpoint-{step}" for step in (4, 5, 6, 7, 8)]
    assert [step for step in (4, 5, 6, 7, 8) if fault_in(run_dir / f"checkpoint-{step}") is None] == [4, 6]
    prune(run_dir, keep=2)
    assert len(list_checkpoints(run_dir)) == 5
    assert not list(run_dir.glob(".tmp-*"))


def test_a_published_checkpoint_is_never_rewritten_and_a_torn_one_is_replaced(run_dir):
    path = run_dir / "checkpoint-2"
    before = (path / ADAPTER_MODEL).read_bytes()
    save(run_dir, 2)
    assert (path / ADAPTER_MODEL).read_bytes() == before
    with pytest.raises(UserError, match=r"checkpoint-2: it is another run's checkpoint, which is not replaced"):
        save(run_dir, 2, run_id="second")
    assert (path / ADAPTER_MODEL).read_bytes() == before
    flip_a_bit(path / OPTIMIZER)
    save(run_dir, 2)
    assert fault_in(path) is None
    assert (path / ADAPTER_MODEL).read_bytes() != before


def test_an_empty_adapter_is_not_written(tmp_path):
    for trainables in ({}, {"layer.A": torch.empty(0, 4)}):
        with pytest.raises(CorruptFileError, match="refusing to write an empty adapter"):
            write_checkpoint(Checkpoint(tmp_path / "checkpoint-0", {}, trainables, {}, TrainerState()))
    assert list(tmp_path.iterdir()) == []


def fill_up(disk: Path) -> None:
    """On a small disk with one checkpoint: leave less and less room, save another, print what became of it."""
    run_dir, ballast = disk / "run", disk / "ballast"
    save(run_dir, 1)
    values = {"values": torch.arange(20_000.0)}
    outcomes = {}
    for room in range(220, 0, -20):
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * room))
        error = None
        try:
            write_checkpoint(Checkpoint(run_dir / "checkpoint-2", {}, values, values, TrainerState(step=2)))
        except SetupError as refusal:
            error = str(refusal)
        outcomes[room] = {"error": error, "left": sorted(path.name for path in run_dir.iterdir())}
        shutil.rmtree(run_dir / "checkpoint-2", ignore_errors=True)
    print(json.dumps({"fault": fault_in(run_dir / "checkpoint-1"), "by_room": outcomes}))


def test_a_full_disk_leaves_nothing_behind_and_the_last_checkpoint_whole(tmp_path):
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 99; exec "$2" -c "$3" "$1"'
    program = "import sys; from tests.unit.storage import test_checkpoint as here; here.fill_up(here.Path(sys.argv[1]))"
    words = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, program]
    done = subprocess.run(words, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    if done.returncode in (1, 99) and "Traceback" not in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["fault"] is None
    refused = [outcome for outcome in report["by_room"].values() if outcome["error"]]
    written = [outcome for outcome in report["by_room"].values() if not outcome["error"]]
    assert all(outcome["left"] == ["checkpoint-1", "checkpoint-2"] for outcome in written)
    assert all(outcome["left"] == ["checkpoint-1"] for outcome in refused)
    message = re.compile(r".*/run: cannot write (\S+), \d+ bytes, with \d+ bytes free: No space left on device")
    stopped_at = {message.fullmatch(outcome["error"])[1] for outcome in refused}
    assert written and stopped_at >= {ADAPTER_MODEL, OPTIMIZER}


def test_an_output_folder_that_cannot_be_made_or_is_too_small_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"output_dir: cannot write to .*/file/run': Not a directory") as refusal:
        require_writable(tmp_path / "file" / "run")
    assert refusal.value.exit_code == 3
    with pytest.raises(UserError, match=r"output_dir: got 'a.x00b'") as refusal:
        require_writable(Path("a\0b"))
    assert refusal.value.exit_code == 2
    require_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists(), "a run that is refused later leaves nothing behind"
    require_checkpoint_space(tmp_path / "new" / "run", 1)
    with pytest.raises(SetupError, match=f"bytes free, a checkpoint needs {2**80}") as refusal:
        require_checkpoint_space(tmp_path, 2**80)
    assert refusal.value.exit_code == 3


def test_a_missing_checkpoint_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint folder '{tmp_path}/checkpoint-5'"):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-5"))
