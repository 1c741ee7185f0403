"""The content of a checkpoint: earlier versions are read, and content that no run can have written is refused."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as tensors_to_bytes

from dist_qft.errors import CorruptFileError
from dist_qft.storage.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    OPTIMIZER,
    TRAINER_STATE,
    fault_in,
    newest_valid,
    prune,
    read_checkpoint,
)
from dist_qft.storage.manifest import publish_folder
from dist_qft.storage.trainer_state import TrainerState, chain_step
from tests.support.checkpoints import FILES, save_small_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_small_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


def publish_variant(run_dir: Path, name: str = "checkpoint-3", **changes: bytes) -> Path:
    """A copy of checkpoint 2 under another name, with some files replaced and a right manifest."""
    files = {file: (run_dir / "checkpoint-2" / file).read_bytes() for file in FILES}
    replaced = {file: changes.get(Path(file).stem, content) for file, content in files.items()}
    publish_folder(run_dir / name, replaced.items())
    return run_dir / name


def test_a_checkpoint_of_the_first_version_is_read(run_dir):
    """It held the whole history, called rows samples and knew no run id; the digest is that of a run begun today."""
    history = [{"step": step, "loss": 1 / step, "lr": 0.1, "grad_norm": 2.0 * step} for step in range(1, 4)]
    old = {"step": 3, "samples_seen": 24, "data_digest": "d", "data_chain": "c", "world_size": 2, "history": history}
    path = publish_variant(run_dir, trainer_state=json.dumps({**old, "base_eval": None, "config": {}}).encode())
    chain = ""
    for entry in history:
        chain = chain_step(chain, entry["step"], entry["loss"], entry["lr"], entry["grad_norm"])
    expected = TrainerState(
        step=3, rows_seen=24, data_digest="d", data_chain="c", world_size=2, history_digest=chain, last_loss=1 / 3
    )
    assert read_checkpoint(path).state == expected
    assert chain_step(chain, 3, 1 / 3, 0.1, 6.0) != chain_step(chain, 3, math.nextafter(1 / 3, 1), 0.1, 6.0)


def test_the_state_does_not_grow_with_the_run():
    early = TrainerState(step=100, rows_seen=800, history_digest="a" * 64, data_chain="b" * 64, metrics_bytes=30_000)
    late = replace(early, step=1_000_000, rows_seen=8_000_000, metrics_bytes=300_000_000)
    assert len(late.to_bytes()) < len(early.to_bytes()) + 16


def test_a_renamed_checkpoint_is_refused(run_dir):
    """Names decide which one is the newest: one with a wrong name would win, or be pruned, for ever."""
    os.rename(run_dir / "checkpoint-1", run_dir / "checkpoint-99")
    fault = f"{TRAINER_STATE}: is the state of step 1, not of step 99"
    assert fault_in(run_dir / "checkpoint-99") == fault
    path, refused = newest_valid(run_dir)
    assert (path, refused) == (run_dir / "checkpoint-2", [f"{run_dir / 'checkpoint-99'}: refused: {fault}"])
    prune(run_dir, keep=1)
    assert (run_dir / "checkpoint-2").exists(), "it does not count as one of the newest"
    os.rename(run_dir / "checkpoint-99", run_dir / "best")
    assert read_checkpoint(run_dir / "best").state.step == 1, "a name without a step promises none"


def test_a_state_with_another_step_is_refused(run_dir):
    state = json.loads((run_dir / "checkpoint-2" / TRAINER_STATE).read_text())
    shutil.rmtree(run_dir / "checkpoint-1")
    path = publish_variant(run_dir, "checkpoint-1", trainer_state=json.dumps({**state, "step": 10**18}).encode())
    with pytest.raises(CorruptFileError, match=rf"{TRAINER_STATE}: is the state of step {10**18}, not of step 1$"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.float64), "layer.A: got torch.float64, must be torch.float32"),
        (torch.ones(2, dtype=torch.float16), "layer.A: got torch.float16, must be torch.float32"),
        (torch.ones(2, dtype=torch.int32), "layer.A: got torch.int32, must be torch.float32"),
        (torch.tensor([1.0, math.nan]), "layer.A: holds values that are not finite"),
        (torch.tensor([math.inf]), "layer.A: holds values that are not finite"),
    ],
)
def test_trainables_that_are_no_finite_floats_are_refused(run_dir, tensor, message):
    path = publish_variant(run_dir, "hostile", adapter_model=tensors_to_bytes({"layer.A": tensor}))
    with pytest.raises(CorruptFileError) as refusal:
        read_checkpoint(path)
    assert str(refusal.value) == f"{path / ADAPTER_MODEL}: {message}"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"base_eval": {"data_digest": "", "loss": math.inf, "tokens": 1}}, "base_eval.loss"),
        ({"base_eval": {"data_digest": "", "loss": 1.0, "tokens": -1}}, "base_eval.tokens"),
        ({"world_size": 0}, "world_size"),
        ({"last_loss": math.nan}, "last_loss"),
        ({"best_loss": math.nan}, "best_loss"),
        ({"version": 3}, "version"),
        ({"version": None}, "version"),
        ({"rows_seen": "many"}, "rows_seen"),
        ({"config": []}, "config"),
        ({"version": 1, "history": {}}, "history"),
        ({"version": 1, "history": [{"step": 1}]}, "history.0.loss"),
        ({"version": 1, "samples_seen": -1}, "samples_seen"),
    ],
)
def test_a_state_that_cannot_be_is_refused_with_its_key(run_dir, change, key):
    state = json.loads((run_dir / "checkpoint-2" / TRAINER_STATE).read_text())
    path = publish_variant(run_dir, "hostile", trainer_state=json.dumps({**state, **change}).encode())
    with pytest.raises(CorruptFileError) as refusal:
        read_checkpoint(path)
    assert str(refusal.value).startswith(f"{path / TRAINER_STATE}: {key}: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAINER_STATE, b'{"step": -1}', "step: Input should be greater than or equal to 0"),
        (TRAINER_STATE, b'{"step": 1, "history": [3]}', "history.0: Input should be a dictionary or an instance"),
        (TRAINER_STATE, b"[" * 100_000, "content: Invalid JSON: recursion limit exceeded"),
        (ADAPTER_CONFIG, b"[]", "content: Input should be an object"),
        (ADAPTER_MODEL, b"\x80\x04\x95", "header"),
        (OPTIMIZER, (10 << 30).to_bytes(8, "little") + b"{}", "header"),
    ],
)
def test_a_hostile_file_under_a_right_manifest_is_refused(run_dir, name, content, message):
    whole = run_dir / "checkpoint-2"
    files = {path: (whole / path).read_bytes() for path in FILES}
    publish_folder(run_dir / "hostile", {**files, name: content}.items())
    assert fault_in(run_dir / "hostile") is None
    with pytest.raises(CorruptFileError) as refusal:
        read_checkpoint(run_dir / "hostile")
    assert str(refusal.value).startswith(f"{run_dir / 'hostile' / name}: ")
    assert message in str(refusal.value)
