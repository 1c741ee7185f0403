"""Runs that die for real: killed, told to stop, out of disk; and what the shell, the disk and the next start see."""

import json
import signal
from pathlib import Path

from dist_qft.config.load import save_config
from dist_qft.config.schema import RunConfig
from dist_qft.storage.checkpoint import fault_in, list_checkpoints, read_checkpoint
from dist_qft.training.metrics_file import METRICS_FILE
from tests.support.commands import Command
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train

STEPS = 40


def write_config(config: RunConfig) -> Path:
    path = Path(config.output_dir).parent / "run.yaml"
    save_config(config, path)
    return path


def train_and_digest(config: RunConfig) -> tuple[str, str, str]:
    run = train(config)
    return adapter_digest(config.output_dir), run.state.data_chain, run.state.history_digest


def last_step(output_dir: Path) -> int:
    metrics = output_dir / METRICS_FILE
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def steps_told(text: str) -> list[int]:
    return [int(line.split("/")[0].removeprefix("step ")) for line in text.splitlines() if line.startswith("step ")]


def test_killed_stopped_and_resumed_is_byte_for_byte_the_undisturbed_run(pools, tiny_llama, tmp_path):
    changes = {"train": {"max_steps": STEPS}, "checkpoint": {"save_steps": 10}, "data": {"eval_samples": 6}}
    undisturbed = tiny_config(tiny_llama, tmp_path / "undisturbed", **changes)
    expected = pools[2].run(train_and_digest, config=undisturbed)[0]
    config = tiny_config(tiny_llama, tmp_path / "run", **changes)
    output_dir, path = Path(config.output_dir), write_config(config)

    with Command("train", path, ranks=2) as command:
        command.wait_until(lambda: list_checkpoints(output_dir) != [])
        command.rank(1).send_signal(signal.SIGKILL)
        killed = command.finish()
    assert killed.code == 128 + signal.SIGKILL
    assert killed.err.count("error: rank 0: ") == 1 and "rank 1 is gone" in killed.err
    assert "Traceback" not in killed.err
    assert steps_told(killed.err) == list(range(1, last_step(output_dir) + 1)), "each step is told once"
    assert all(fault_in(path) is None for path in list_checkpoints(output_dir))

    newest = list_checkpoints(output_dir)[-1]
    first = read_checkpoint(newest).state.step
    with Command("train", path, "--resume", "auto", ranks=2) as command:
        command.wait_until(lambda: last_step(output_dir) >= first + 3)
        command.rank(1).send_signal(signal.SIGTERM)
        stopped = command.finish()
    assert stopped.code == 75
    newest = list_checkpoints(output_dir)[-1]
    step = read_checkpoint(newest).state.step
    assert first + 3 < step < STEPS
    errors = [line for line in stopped.err.splitlines() if line.startswith("error:")]
    assert errors == [f"error: stopped by a signal after step {step}, which is saved; continue with --resume auto"]
    assert steps_told(stopped.err) == list(range(first + 1, step + 1))

    with Command("train", path, "--resume", "auto", ranks=2) as command:
        done = command.finish()
    assert done.code == 0, done.err
    assert f"resuming from {newest} at step {step}" in done.err
    state = read_checkpoint(output_dir / f"checkpoint-{STEPS}").state
    assert (adapter_digest(output_dir), state.data_chain, state.history_digest) == expected
    metrics = [json.loads(line) for line in (output_dir / METRICS_FILE).read_text().splitlines()]
    assert [record["step"] for record in metrics if "train/loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in metrics if "base/loss" in record] == [0], "the base is evaluated once"


def test_an_interrupt_saves_and_says_so_and_a_second_one_ends_the_run_at_once(tiny_llama, tmp_path):
    run = tmp_path / "run"
    path = write_config(tiny_config(tiny_llama, run, train={"max_steps": 4000}))
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
