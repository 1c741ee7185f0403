"""The verbs for a first run: every config that `init` writes is whole, and `doctor` finds what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_qft import doctor
from dist_qft.config.check import accumulation_steps
from dist_qft.config.load import load_config
from dist_qft.errors import UserError
from dist_qft.init import GOALS, Answers, commands, write_config


def answers(**changes) -> Answers:
    given = {"model": "Qwen/Qwen3-8B", "data": "my.jsonl", "goal": "adapter", "gpus": 2, "nodes": 1, "output": "runs/x"}
    return Answers(**given | changes)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize(("gpus", "nodes"), [(0, 1), (1, 1), (3, 2), (8, 16)])
def test_every_goal_gives_a_config_that_runs_on_its_ranks(tmp_path, goal, gpus, nodes):
    file = tmp_path / "run.yaml"
    model = "base.gguf" if goal == "exact-gguf" else "Qwen/Qwen3-8B"
    asked = answers(goal=goal, gpus=gpus, nodes=nodes, model=model)
    write_config(file, asked)
    config = load_config(file)
    assert accumulation_steps(config, asked.ranks) >= 1
    assert config.sharding.device == ("cuda" if gpus else "cpu")
    assert config.sharding.group == ("node" if nodes > 1 else "world")
    assert (config.merge.at_end if config.merge else None) == GOALS[goal].merge
    assert all(str(file) in command for command in commands(file, asked))


def test_commands_quote_what_a_shell_would_split(tmp_path):
    file = tmp_path / "my run.yaml"
    assert all(f" '{file}'" in command for command in commands(file, answers()))
    write_config(file, answers())
    assert f"validate '{file}'" in file.read_text()


def test_a_path_with_any_signs_in_it_comes_through(tmp_path):
    odd = 'my data/it\'s: "#1".jsonl'
    write_config(tmp_path / "run.yaml", answers(data=odd))
    assert load_config(tmp_path / "run.yaml").data.train.path == odd


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"goal": "best"}, "--goal: got 'best', must be one of adapter"),
        ({"goal": "exact-gguf"}, "--model: got 'Qwen/Qwen3-8B', must be a .gguf file"),
        ({"nodes": 0}, "--nodes: got"),
    ],
)
def test_a_refused_answer_writes_nothing(tmp_path, change, said):
    with pytest.raises(UserError) as caught:
        write_config(tmp_path / "run.yaml", answers(**change))
    assert said.split(",")[0].split(": got")[0] in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_kept(tmp_path):
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_config(tmp_path / "run.yaml", answers())
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_init_and_doctor_as_commands(shell, tmp_path):
    file = tmp_path / "run.yaml"
    code, out, _ = shell("init", file, "--model", "a/b", "--data", "c/d", "--gpus", 2)
    assert code == 0 and f"NPROC_PER_NODE=2 launch/torchrun.sh {file}" in out
    assert shell("init", tmp_path / "other.yaml")[0] == 2  # nobody to ask for the model
    code, out, _ = shell("doctor")
    assert code == 0 and "a run can start here" in out


def test_what_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    write_config(file, answers(output=str(tmp_path / "out")))
    installed = doctor.version
    absent = {"bitsandbytes", "deepspeed"}

    def version(name: str) -> str:
        if name in absent:
            raise doctor.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_INFINIBAND", Path(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = {finding.what: finding for finding in doctor.examine(load_config(file, ["sharding.engine=zero"]))}
    assert {name for name, finding in found.items() if finding.status == "missing"} == {"GPU", *absent}
    assert "dist-qft[deepspeed]" in found["deepspeed"].remedy
    without = {finding.what: finding.status for finding in doctor.examine()}
    assert (without["GPU"], without["deepspeed"], without["bitsandbytes"]) == ("note", "note", "missing")


@pytest.mark.parametrize(("wanted", "status"), [("lo,eth77", "missing"), ("lo", "note"), ("lo,lo", "note")])
def test_the_interface_that_the_user_names_is_looked_for(monkeypatch, wanted, status):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", wanted)
    network = next(finding for finding in doctor.examine() if finding.what == "network")
    assert (network.status, "eth77" in network.found) == (status, "eth77" in wanted)


def test_what_is_found_is_printed_as_it_is(monkeypatch, capsys):
    """Brackets are no markup: of an extra's name, of a folder."""
    monkeypatch.setenv("COLUMNS", "200")
    remedy = doctor._package("no-such-package", "note", "pip install 'dist-qft[deepspeed]'").remedy
    doctor.print_findings([doctor.Finding("disk", "missing", "'/data/[/x] :memo:' cannot be written", remedy)])
    out = capsys.readouterr().out
    assert "'/data/[/x] :memo:' cannot be written" in out and "pip install 'dist-qft[deepspeed]'" in out
    assert "missing disk" in out and out.endswith("cannot start: disk\n")


def test_without_pytorch_the_table_is_still_printed(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.13: cannot open [/x]')\n")
    write_config(tmp_path / "run.yaml", answers(gpus=0))
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "COLUMNS": "300"}
    command = [sys.executable, "-m", "dist_qft", "doctor", tmp_path / "run.yaml"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (3, "")
    assert "libcudart.so.13: cannot open [/x]" in done.stdout and "cannot start: torch" in done.stdout


def test_scripts_that_the_doctor_names_are_there(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "version", _absent)
    said = " ".join(finding.remedy for finding in doctor.examine())
    scripts = set(re.findall(r"(?:launch|slurm)/[\w.]+", said))
    assert len(scripts) > 3 and all((Path(__file__).parents[2] / script).is_file() for script in scripts)


def _absent(name: str) -> str:
    raise doctor.PackageNotFoundError(name)
