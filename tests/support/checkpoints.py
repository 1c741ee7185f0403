"""Small checkpoints without a run behind them."""

from pathlib import Path

import torch

from dist_qft.storage.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    OPTIMIZER,
    TRAINER_STATE,
    Checkpoint,
    checkpoint_path,
    write_checkpoint,
)
from dist_qft.storage.trainer_state import TrainerState

FILES = (ADAPTER_CONFIG, ADAPTER_MODEL, OPTIMIZER, TRAINER_STATE)


def save_small_checkpoint(output_dir: Path, step: int, run_id: str = "first") -> Path:
    """A small checkpoint; no two are alike, even of the same step."""
    generator = torch.Generator().manual_seed(step)
    checkpoint = Checkpoint(
        path=checkpoint_path(output_dir, step),
        adapter_config={"peft_type": "DIST_QFT_TILE", "tiles": {"layer": {"rank": 2}}},
        trainables={"layer.A": torch.randn(2, 8, generator=generator), "layer.B": torch.randn(8, 2)},
        optimizer={"step": torch.tensor(float(step)), "exp_avg": torch.randn(32, generator=generator)},
        state=TrainerState(run_id=run_id, step=step, rows_seen=8 * step, data_chain="ab", last_loss=0.1),
    )
    write_checkpoint(checkpoint)
    return checkpoint.path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
