"""A checkpoint's base with the same weights and other settings: every verb refuses it with the file and its key."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_qft.base_model.base_settings import BaseSettings
from dist_qft.config.load import save_config
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.storage import manifest
from dist_qft.storage.checkpoint import ADAPTER_CONFIG, list_checkpoints
from tests.support.tiny_model import save_tiny_model, tiny_config
from tests.support.whole_runs import train_only


@pytest.fixture(scope="module")
def trained(pools, tmp_path_factory) -> Path:
    """A folder with a base, a run of two steps on it, and the run's config."""
    place = tmp_path_factory.mktemp("trained")
    (save_tiny_model(place / "base") / "generation_config.json").write_text('{"eos_token_id": 2}')
    config = tiny_config(place / "base", place / "run", train={"max_steps": 2}, data={"eval_samples": 4})
    save_config(config, place / "run.yaml")
    pools[1].run(train_only, config=config)
    return place


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "config.json: rope_parameters.rope_theta": (
        "config.json",
        lambda tree: tree["rope_parameters"].update(rope_theta=5e5),
    ),
    "config.json: rms_norm_eps": ("config.json", lambda tree: tree.update(rms_norm_eps=1e-3)),
    "config.json: hidden_act": ("config.json", lambda tree: tree.update(hidden_act="gelu")),
    "generation_config.json: eos_token_id": ("generation_config.json", lambda tree: tree.update(eos_token_id=[0, 2])),
    "tokenizer.json: model.merges": ("tokenizer.json", lambda tree: tree["model"]["merges"].pop()),
    "tokenizer_config.json: eos_token": ("tokenizer_config.json", lambda tree: tree.update(eos_token="<|im_start|>")),
}


def test_settings_by_which_tokens_are_drawn_may_change(trained, shell):
    """Of generation_config.json only the ends are used; records of earlier versions hold all of it."""
    file = trained / "base" / "generation_config.json"
    before = file.read_bytes()
    (checkpoint,) = list_checkpoints(trained / "run")
    stored = BaseSettings.read(json.loads((checkpoint / ADAPTER_CONFIG).read_text())["base_settings"], "here")
    older = replace(stored, files=stored.files | {"generation_config.json": {"eos_token_id": 2, "temperature": 0.7}})
    assert stored.differences(older) == older.differences(stored) == []
    edit(file, lambda tree: tree.update(temperature=0.6, top_k=20))
    try:
        assert shell("eval", trained / "run")[0] == 0
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("key", CHANGES)
def test_every_verb_names_the_setting_that_has_changed(trained, shell, tmp_path, key):
    name, change = CHANGES[key]
    run, file, output = trained / "run", trained / "base" / name, tmp_path / "out"
    before = file.read_bytes()
    edit(file, change)
    try:
        ended = [
            shell("train", trained / "run.yaml", "train.max_steps=3", "--resume", "auto"),
            shell("eval", run),
            shell("generate", run, "--prompt", "Say"),
            shell("merge", run, "--to", "dense", "-o", output),
            shell("train", trained / "run.yaml", f"output_dir={output}", f"method.init_from={run}"),
        ]
    finally:
        file.write_bytes(before)
    if name != "config.json":  # a new run may have another tokenizer
        assert ended.pop()[0] == 0
        shutil.rmtree(output)
    assert [code for code, _, _ in ended] == [UserError.exit_code] * len(ended), ended
    assert all(re.search(rf"base.*{re.escape(key)}: got .*, must be ", err) for _, _, err in ended), ended
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokenizer_config.json", lambda tree: tree.update(model_max_length=[1]), "cannot read a tokenizer"),
        # The library writes such a vocabulary down by counting up to the largest id.
        ("tokenizer.json", lambda tree: tree["model"]["vocab"].update(l=2**31 - 1), "tokenizer: got id 2147483647"),
    ],
)
def test_a_tokenizer_that_fails_in_use_is_one_line(trained, shell, name, change, words):
    file = trained / "base" / name
    before = file.read_bytes()
    edit(file, change)
    try:
        code, _, err = shell("eval", trained / "run")
    finally:
        file.write_bytes(before)
    assert code == UserError.exit_code and "model.path: " in err and words in err and err.count("\n") == 1


def with_settings(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest checkpoint's description, and its manifest with it."""
    (folder,) = list_checkpoints(run)
    edit(folder / ADAPTER_CONFIG, change)
    files = [(file.name, file.read_bytes()) for file in folder.iterdir() if file.name != manifest.MANIFEST]
    shutil.rmtree(folder)
    manifest.publish_folder(folder, files)


def test_a_checkpoint_from_before_the_record_works_and_says_so(trained, shell, tmp_path):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    with_settings(run, lambda tree: tree.pop("base_settings"))
    for command in (("eval", run), ("generate", run, "--prompt", "Say"), ("merge", run, "--to", "dense")):
        code, _, err = shell(*command)
        assert code == 0 and err.count("is not checked") == 1, err


def test_a_record_that_is_none_is_a_corrupt_file(trained, shell, tmp_path):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    with_settings(run, lambda tree: tree.update(base_settings={"files": [1]}))
    code, _, err = shell("eval", run)
    assert code == CorruptFileError.exit_code and "base_settings" in err


def test_another_release_may_read_more_keys_and_write_a_tokenizer_differently(trained, shell, tmp_path):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))

    def of_another_release(tree: dict[str, Any]) -> None:
        settings = tree["base_settings"]
        settings["versions"]["transformers"] = "0.1"
        del settings["files"]["config.json"]["hidden_act"]
        settings["files"]["config.json"]["a_key_of_old"] = 1
        settings["files"]["tokenizer.json"]["model.merges"] = "SHA-256 of another spelling"

    with_settings(run, of_another_release)
    code, _, err = shell("eval", run)
    assert code == 0 and "warning: model.path" in err and "model.merges" in err and "transformers 0.1" in err
