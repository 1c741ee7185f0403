"""Bad input through the real command line: exit code 2, one message, nothing written, and the base never loaded.

Every run here is on a poisoned base, whose weights are all NaN: whoever reads one complains of that and nothing else.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_qft.cli import main
from dist_qft.config.load import save_config
from tests.support.commands import Command
from tests.support.tiny_model import save_tiny_model, tiny_config, tiny_llama_config

WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID")


def poison(model: Path) -> Path:
    """All bits of all weights set, which is NaN in every float format; header and shapes stay."""
    path = model / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    return model


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    return poison(save_tiny_model(tmp_path_factory.mktemp("poisoned")))


@pytest.fixture
def command(monkeypatch, capfd) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process; returns exit code and standard error."""
    for name in WORLD_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dist-qft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capfd.readouterr().err

    return run


@pytest.fixture
def refused(command, poisoned, tmp_path) -> Callable[..., str]:
    """Train with these words and sections; returns the one message, after checking that nothing else came of it."""

    def run(*words: str, model: Path | str = poisoned, edit: Callable[[str], str] = str, **sections: dict) -> str:
        path = tmp_path / "run.yaml"
        save_config(tiny_config(model, tmp_path / "run", **sections), path)
        path.write_text(edit(path.read_text()))
        code, err = command("train", path, *words)
        assert code == 2, err
        assert err.startswith("error: ") and err.endswith("\n")
        assert all(line.startswith("       ") for line in err.splitlines()[1:]), err
        assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []
        assert not list(tmp_path.rglob("*.safetensors")), "no tokens are kept of data that is refused"
        return err.removeprefix("error: ").removesuffix("\n").replace(f"{tmp_path}/", "")

    return run


def write_rows(folder: Path, *rows: object) -> dict[str, object]:
    """A data section with a jsonl file of these rows; text is written as it is."""
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return {"train": {"path": str(path)}}


GOOD = {"prompt": "Say cat:", "completion": " cat sat"}


def test_the_poison_works(command, poisoned, tmp_path):
    save_config(tiny_config(poisoned, tmp_path / "run"), tmp_path / "run.yaml")
    code, err = command("train", tmp_path / "run.yaml")
    assert code == 2
    assert err == (
        f"error: rank 0: {poisoned}: rows 0 to 64 of tensor 'model.layers.0.self_attn.q_proj.weight': "
        "the weight at [0, 0] is nan, must be a finite float32 value\n"
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("learning_rate", "learning_rat", "unknown key 'train.learning_rat', did you mean 'train.learning_rate'?"),
        ("sharding", "shardin", "unknown key 'shardin', did you mean 'sharding'?"),
        ("max_steps: 4", "max_steps: four", "train.max_steps: "),
        ("learning_rate: 0.005", "learning_rate: .nan", "train.learning_rate: "),
        ("engine: fsdp", "engine: fdsp", "sharding.engine: "),
    ],
)
def test_a_key_or_value_that_is_not_known(refused, tmp_path, before, after, message):
    found = refused(edit=lambda text: text.replace(before, after, 1))
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    line = next(number for number, line in enumerate(lines, 1) if line.strip().startswith(after))
    assert found.startswith(f"run.yaml:{line}: {message}"), found
    assert "\n" not in found


def test_all_faults_of_a_config_are_told_at_once(refused):
    found = refused("train.max_steps=four", "sharding.engine=none", "method.ranks=3").splitlines()
    assert len(found) == 3
    for place in ("command line: train.max_steps=four", "command line: sharding.engine=none", "method.ranks"):
        assert sum(place in line for line in found) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.targets=[query]"], "method.targets: "),
        (["quantization.block=[8, 48]"], "48 does not divide in_features 64 (nearest: 32 or 64)"),
        (["train.global_batch_size=6", "train.per_device_train_batch_size=4"], "_size 4: 4 or 8"),
        (["sharding.group=3"], "sharding.group: got 3, must divide the 1 ranks of the run"),
        (["data.eval_samples=60"], "data.eval_samples: got 60, must be at most 59 of the 60 samples"),
        (["data.train.path=nowhere.jsonl"], "data.train.path: no such file or folder: nowhere.jsonl"),
        (["model.path=./nowhere"], "model.path: no such file or folder './nowhere'"),
        (["model.path=owner/nothing"], "model.path: cannot read the configuration of 'owner/nothing'"),
    ],
)
def test_settings_that_fit_no_layer_or_file(refused, words, message):
    found = refused(*words)
    assert message in found
    assert "\n" not in found


def test_a_factor_that_does_not_divide_is_told_once_for_each_kind_of_layer(refused):
    lines = refused("method.pool=48").splitlines()
    assert [line.split()[8].removesuffix(";").split(".")[-1] for line in lines] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert lines[0] == (
        "method.pool: 48 does not divide in_features 64 of model.layers.0.self_attn.q_proj and 2 more q_proj; "
        "nearest that does: 32 or 64"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, GOOD, '{"prompt": "Say'], "rows.jsonl:3:16: malformed JSON"),
        ([GOOD, '{"prompt": "a", "completion": "b"} x'], "rows.jsonl:2:36: malformed JSON"),
        ([GOOD, {"prompt": "Say dog:"}], "rows.jsonl:2: "),
        ([GOOD, {"prompt": "Say dog:", "completion": 3}], "rows.jsonl:2: "),
        ([], "rows.jsonl is empty"),
        (["", "  "], "rows.jsonl"),
        ([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 2, "has a token to train on (dropped_no_targets 2, read 2"),
        ([{"input_ids": [5, 320], "labels": [5, 320]}], "rows.jsonl:1: "),
        ([{"input_ids": [5, -1], "labels": [5, -1]}], "rows.jsonl:1: "),
    ],
)
def test_data_that_cannot_be_trained_on(refused, tmp_path, rows, message):
    found = refused(data=write_rows(tmp_path, *rows))
    assert message in found
    assert "\n" not in found


def test_a_tokenizer_whose_ids_lie_outside_the_embedding(refused, tmp_path):
    small = poison(save_tiny_model(tmp_path / "model", tiny_llama_config(vocab_size=280)))
    (small / "model.safetensors").rename(small / "model.weights")  # or the search for kept tokens would find it
    found = refused(model=small)
    assert re.fullmatch(
        r"data.jsonl:\d+: got token id \d+ at position \d+, must be 0 to 279, the model's vocabulary", found
    )


def test_a_model_that_is_none(refused, tmp_path, poisoned):
    for name in ("unknown", "absent", "broken"):
        (tmp_path / name).mkdir()
    config = json.loads((poisoned / "config.json").read_text())
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    (tmp_path / "broken" / "config.json").write_text("{")
    messages = {name: refused(model=tmp_path / name) for name in ("unknown", "absent", "broken")}
    assert "`nonesuch`" in messages["unknown"]
    assert "model.path: 'absent' has no config.json" in messages["absent"]
    assert "model.path: cannot read the configuration of 'broken'" in messages["broken"]
    assert all("\n" not in message for message in messages.values())


def test_weights_that_are_not_those_of_the_configuration(command, poisoned, tmp_path):
    shutil.copytree(poisoned, tmp_path / "other")
    config = json.loads((poisoned / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    save_config(tiny_config(tmp_path / "other", tmp_path / "run"), tmp_path / "run.yaml")
    code, err = command("train", tmp_path / "run.yaml")
    assert code == 2
    assert err == f"error: {tmp_path}/other: holds 3 decoder layers, the configuration says 4\n"


def test_an_output_folder_that_cannot_be_written(command, poisoned, tmp_path):
    (tmp_path / "file").write_text("")
    save_config(tiny_config(poisoned, tmp_path / "run"), tmp_path / "run.yaml")
    code, err = command("train", tmp_path / "run.yaml", f"output_dir={tmp_path}/file/run")
    assert (code, err) == (3, f"error: output_dir: cannot write to '{tmp_path}/file/run': Not a directory\n")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "disagree"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be less than WORLD_SIZE=2"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
    ],
)
def test_launchers_that_contradict_each_other_or_themselves(refused, monkeypatch, variables, message):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    assert message in refused()


def test_an_adapter_of_another_base(command, tiny_llama, tmp_path):
    path, run_dir = tmp_path / "run.yaml", tmp_path / "run"
    other = save_tiny_model(tmp_path / "other", tiny_llama_config(initializer_range=0.2))
    save_config(tiny_config(tiny_llama, run_dir, train={"max_steps": 1}), path)
    assert command("train", path)[0] == 0
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")}
    code, err = command("train", path, "--resume", "auto", f"model.path={other}", "train.max_steps=2")
    fingerprints = re.findall(r"\b[0-9a-f]{16}\b(?=\.\.\.)", err)
    assert (code, err) == (
        2,
        f"error: {run_dir}/checkpoint-1: trained on base {fingerprints[0]}..., this base is {fingerprints[1]}... "
        "(another model or another quantization)\n",
    )
    assert fingerprints[0] != fingerprints[1]
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")} == before


def test_the_shell_sees_one_message_for_all_ranks(poisoned, tmp_path):
    path = tmp_path / "run.yaml"
    save_config(tiny_config(poisoned, tmp_path / "run", data=write_rows(tmp_path, GOOD, "{]")), path)
    with Command("train", path, ranks=2) as command:
        found = command.finish()
    assert found.code == 2
    assert found.err.startswith(f"error: {tmp_path}/rows.jsonl:2:2: ") and found.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_costs_no_start_of_torch(poisoned, tmp_path):
    path = tmp_path / "run.yaml"
    save_config(tiny_config(poisoned, tmp_path / "run"), path)
    with Command("train", path, "train.sed=1") as command:
        found = command.finish()
    assert found.code == 2
    assert found.err == "error: command line: train.sed=1: unknown key 'train.sed', did you mean 'train.seed'?\n"
    assert not (tmp_path / "run").exists()
