"""Ctrl-C, once and twice: what the shell and the disk see."""

import json
import signal
from pathlib import Path

from dist_qft.config.load import save_config
from dist_qft.storage.checkpoint import list_checkpoints, read_checkpoint
from dist_qft.training.metrics_file import METRICS_FILE
from tests.support.commands import Command
from tests.support.tiny_model import tiny_config


def last_step(output_dir: Path) -> int:
    metrics = output_dir / METRICS_FILE
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def test_an_interrupt_saves_and_says_so_and_a_second_one_ends_the_run_at_once(tiny_llama, tmp_path):
    run = tmp_path / "run"
    path = tmp_path / "run.yaml"
    save_config(tiny_config(tiny_llama, run, train={"max_steps": 4000}), path)
    with Command("train", path) as command:
        command.wait_until(lambda: last_step(run) >= 2)
        command.process.send_signal(signal.SIGINT)
        interrupted = command.finish()
    assert interrupted.code == 75
    assert "Ctrl-C again within 3 s" in interrupted.err and "Traceback" not in interrupted.err
    (saved,) = list_checkpoints(run)
    with Command("train", path, "--resume", "auto") as command:
        command.wait_until(lambda: last_step(run) >= read_checkpoint(saved).state.step + 2)
        # Stopped meanwhile: it finds both at once, and must not end by the first.
        command.process.send_signal(signal.SIGINT)
        command.process.send_signal(signal.SIGSTOP)
        command.process.send_signal(signal.SIGCONT)
        command.process.send_signal(signal.SIGINT)
        ended = command.finish()
    assert ended.code in (75, 130) and "Traceback" not in ended.err
