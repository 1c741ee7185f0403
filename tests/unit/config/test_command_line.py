"""The command line: what reaches the config, what is refused, and what the shell sees."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_qft import __version__
from dist_qft.cli import app, print_error
from dist_qft.errors import NumericError
from dist_qft.ranks.launchers import LAUNCHERS


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for names in LAUNCHERS:
        monkeypatch.delenv(names.local_rank, raising=False)


@pytest.fixture
def config(tmp_path):
    model = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\nsharding: {{device: cpu}}\n")
    return path


def shell(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dist_qft", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_version_and_help(shell):
    assert shell("version") == (0, f"{__version__}\n", "")
    code, out, _ = shell("--help")
    assert code == 0
    registered = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert registered >= {"train", "validate", "eval", "generate", "merge", "verify", "bench", "study", "version"}
    assert registered <= set(out.split())


@pytest.mark.parametrize(
    "words",
    [
        ("train.learning_rate=1e-5", "train.seed=3", "--json", "--world-size", "2"),
        ("--json", "--world-size=2", "train.learning_rate=1e-5", "train.seed=3"),
        ("--train.learning_rate", "1e-5", "--json", "--train.seed=3", "--world-size", "2"),
        ("--train.learning-rate=1e-5", "--world-size", "2", "train.seed=3", "--json"),
    ],
)
def test_options_and_overrides_in_any_order_and_form(shell, config, words):
    code, out, err = shell("validate", config, *words)
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["optimization"]["learning_rate"] == 1e-5
    assert plan["world_size"] == 2


def test_dry_run_prints_the_plan_and_writes_nothing(shell, config, tmp_path):
    code, out, err = shell("train", config, "--dry-run", "method.name=qbara")
    assert (code, err) == (0, "")
    assert "qbara" in out
    assert not (tmp_path / "out").exists()


def test_train_without_data_is_refused(shell, config):
    code, out, err = shell("train", config)
    assert (code, out) == (2, "")
    assert err == "error: data: training needs data.train\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (("--train.sed=3",), "error: command line: train.sed=3: unknown key 'train.sed', did you mean 'train.seed'?\n"),
        (("--seed=3",), "error: unknown option '--seed=3'\n"),
        (("-x",), "error: unknown option '-x'\n"),
        (("--train.seed",), "error: option '--train.seed' needs a value\n"),
        (("more.yaml",), "error: command line: more.yaml: must be key.sub=value\n"),
        (
            ("a", "train.seed=x"),
            "error: command line: a: must be key.sub=value\n"
            "       command line: train.seed=x: got 'x' (str), must be an integer >= 0\n",
        ),
    ],
)
def test_bad_words_are_one_error(shell, config, words, message):
    assert shell("validate", config, *words) == (2, "", message)


def test_option_before_the_config_is_refused(shell, config):
    code, _, err = shell("validate", "--train.seed", "3", config)
    assert (code, err) == (2, "error: unknown option '--train.seed' before CONFIG; overrides come after it\n")


@pytest.mark.parametrize(
    "words, message",
    [
        (("fly",), "No such command 'fly'"),
        (("train",), "Missing argument 'CONFIG'"),
        (("generate", "run"), "Missing option '--prompt'"),
        (("generate", "run", "--prompt", "x", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
        (("validate", "x.yaml", "--world-size", "0"), "Invalid value for '--world-size'"),
    ],
)
def test_wrong_usage_exits_with_2(shell, words, message):
    code, out, err = shell(*words)
    assert (code, out) == (2, "")
    assert message in err


def test_eval_of_a_folder_without_a_checkpoint_is_refused(shell, tmp_path):
    code, _, err = shell("eval", tmp_path)
    assert (code, err) == (2, f"error: '{tmp_path}' holds no checkpoint\n")


def catches(process: "subprocess.Popen[str]", number: signal.Signals) -> bool:
    assert process.poll() is None
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_the_local_rank_that_deepspeed_adds_is_no_option_of_a_verb(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    done = shell("--local_rank=0", "version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
    assert shell("--local_rank=1", "version").returncode == 2


@pytest.mark.parametrize("variable", [names.local_rank for names in LAUNCHERS])
def test_the_first_rank_of_a_node_speaks_and_the_launcher_ends_the_others(variable, tmp_path):
    def start(rank: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "dist_qft", "validate", "absent.yaml"]
        env = os.environ | {variable: rank}
        return subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    other, first = start("1"), start("0")
    said = "error: absent.yaml: cannot read the config: No such file or directory\n"
    assert (first.communicate(timeout=30)[1], first.returncode) == (said, 2)
    while not catches(other, signal.SIGTERM):  # it has failed, too
        time.sleep(0.01)
    other.terminate()
    assert (other.communicate(timeout=30)[1], other.returncode) == ("", 2)


def test_where_no_launcher_ends_it_a_rank_speaks_for_itself_in_the_end(shell, monkeypatch):
    monkeypatch.setattr("dist_qft.cli.entry.FIRST_RANK_SECONDS", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = "error: absent.yaml: cannot read the config: No such file or directory\n"
    assert shell("validate", "absent.yaml") == (2, "", said)


def test_an_error_of_one_rank_is_told_by_that_rank(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "3")
    own = NumericError("step 5: gradient is nan\nfirst in model.layers.0")
    own.rank_prefix = "rank 3"
    print_error(own)
    assert capsys.readouterr().err == "error: rank 3: step 5: gradient is nan\n       first in model.layers.0\n"


def test_shell_sees_one_block_and_code_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: a\nmodel: {path: b}\nlora_r: 8\ntrain: {seed: x}\n")
    done = shell("train", path, "train.max_steps=-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: command line: train.max_steps=-1: got -1 (int), must be an integer > 0\n"
        f"       {path}:3: unknown key 'lora_r', did you mean 'method.rank'?\n"
        f"       {path}:4: train.seed: got 'x' (str), must be an integer >= 0\n"
    )


def test_shell_sees_usage_errors_and_missing_files_as_2(tmp_path):
    for arguments in (("validate",), ("validate", tmp_path / "absent.yaml"), ("--nonsense",)):
        done = shell(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr


def test_interrupt_exits_with_130(tmp_path):
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    child = subprocess.Popen([sys.executable, "-m", "dist_qft", "train", pipe], stderr=subprocess.PIPE, text=True)
    with open(pipe, "w"):  # opens once the child reads it, so the child is past its imports
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130
    assert "Traceback" not in child.stderr.read()


def test_a_refused_config_does_not_wait_for_torch(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: a\nmodel: {path: b}\nmethod: {name: qahira}\n")
    code = f"import sys, dist_qft.config.load as l; l.load_config({str(path)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
