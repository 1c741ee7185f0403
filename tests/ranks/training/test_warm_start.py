"""`method.init_from`: values of a run or of a stock PEFT folder, on other data, with a fresh optimizer."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dist_qft
from dist_qft.hub.command import run_push
from dist_qft.methods.adapters.tile_adapter import exact_dW
from dist_qft.storage.checkpoint import list_checkpoints, read_checkpoint
from tests.support.merges import merge_run
from tests.support.outcomes import attempt
from tests.support.tiny_model import tiny_config, write_data

QLORA = {"method": {"name": "qlora", "rank": 4, "pool": None, "repeat": None}}
STILL = {"max_steps": 1, "learning_rate": 1e-12}


def errors(pools, config, world=1):
    return [outcome.error for outcome in pools[world].run(attempt, config=config)]


def updates(run):
    adapters = dist_qft.load(run).adapters
    deltas = adapters.token_rows.deltas if adapters.token_rows else {}
    rows = {path: delta.detach() for path, delta in deltas.items()}
    return {path: exact_dW(adapter) for path, adapter in adapters.by_path.items()} | rows


@pytest.mark.parametrize("source", ["run", "pushed", "peft"])
def test_a_run_begins_with_the_values_of_another(pools, make_run, tiny_llama, tmp_path, source):
    qlora = dict(QLORA["method"], train_tokens=[7, 3])
    trained = make_run(tiny_llama, method=qlora)
    place = {"run": trained, "pushed": tmp_path / "pushed", "peft": tmp_path / "lora"}[source]
    method = dict(qlora, init_from=str(place))
    if source == "pushed":
        run_push(str(trained), "owner/adapters", private=True, dry_run=place)
    if source == "peft":
        pools[1].run(merge_run, source=trained, target="peft", path=place)
        method["alpha"] = 5.0  # another scale than theirs: B makes up for it
    data = {"train": {"path": str(write_data(tmp_path / "other.jsonl", 20))}}
    config = tiny_config(tiny_llama, tmp_path / "run", method=method, data=data, train=STILL)
    assert errors(pools, config, world=2) == ["", ""]
    wanted, found = updates(trained), updates(config.output_dir)
    assert wanted.keys() == found.keys()
    for path, update in wanted.items():
        torch.testing.assert_close(found[path], update, rtol=1e-5, atol=1e-8)
        assert update.abs().max() > 0
    state = read_checkpoint(list_checkpoints(tmp_path / "run")[-1]).state
    assert state.step == 1


def test_what_does_not_fit_is_refused_by_name(pools, make_run, tiny_llama, tmp_path):
    trained = make_run(tiny_llama, **QLORA)
    pools[1].run(merge_run, source=trained, target="peft", path=tmp_path / "lora")

    def refusal(place, **changes):
        method = {**QLORA["method"], "init_from": str(place), **changes}
        (error,) = errors(pools, tiny_config(tiny_llama, tmp_path / "run", method=method, train=STILL))
        assert error.startswith("method.") and not list_checkpoints(tmp_path / "run")
        return error

    assert "rank was 4, the config says 8" in refusal(trained, rank=8)
    assert "must be [8, " in refusal(tmp_path / "lora", rank=8)
    assert "must be qlora" in refusal(tmp_path / "lora", name="qahira", pool=4, repeat=8)
    _drop_a_layer(tmp_path / "lora")
    assert "layers missing" in refusal(tmp_path / "lora")
    assert "DORA" in _with(tmp_path / "lora", {"peft_type": "DORA"}, refusal)
    assert "use_dora" in _with(tmp_path / "lora", {"use_dora": True}, refusal)
    assert "PEFT folder" in refusal(tmp_path)
    tokens = {"trainable_token_indices": [3, 7]}
    assert "train_tokens: got nothing, must be [3, 7]" in _with(tmp_path / "lora", tokens, refusal)


@pytest.mark.parametrize("layout", ["beside a trainer's state", "above checkpoints", "in checkpoints alone"])
def test_folders_of_other_trainers_are_peft_folders(pools, make_run, tiny_llama, tmp_path, layout):
    """Hugging Face's Trainer and those built on it leave files and folders of the names that ours have."""
    trained, folder = make_run(tiny_llama, **QLORA), tmp_path / "out"
    places = {
        "beside a trainer's state": [folder],
        "above checkpoints": [folder, folder / "checkpoint-6"],
        "in checkpoints alone": [folder / "checkpoint-4", folder / "checkpoint-12"],
    }[layout]
    pools[1].run(merge_run, source=trained, target="peft", path=tmp_path / "lora")
    for place in places:
        shutil.copytree(tmp_path / "lora", place)
        (place / "trainer_state.json").write_text('{"global_step": 6, "log_history": []}')
    if layout == "in checkpoints alone":  # the newest is taken, by number
        save_file({}, folder / "checkpoint-4" / "adapter_model.safetensors")
    config = tiny_config(
        tiny_llama, tmp_path / "run", method={**QLORA["method"], "init_from": str(folder)}, train=STILL
    )
    assert errors(pools, config) == [""]
    for path, update in updates(trained).items():
        torch.testing.assert_close(updates(config.output_dir)[path], update, rtol=1e-5, atol=1e-8)


def test_a_damaged_checkpoint_of_ours_is_no_peft_folder(pools, make_run, tiny_llama, tmp_path):
    shutil.copytree(list_checkpoints(make_run(tiny_llama, **QLORA))[-1], tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    config = tiny_config(
        tiny_llama, tmp_path / "run", method={**QLORA["method"], "init_from": str(tmp_path)}, train=STILL
    )
    assert "checkpoint-3: refused: trainer_state.json" in errors(pools, config)[0]


def test_a_head_is_a_tasks_own(pools, make_run, tiny_llama, tmp_path):
    """From texts to labels it begins as it always does, back to texts it is left out."""
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"text": f"the cat sat {i}", "label": i % 2}) + "\n" for i in range(8)))
    task = {"name": "classification", "labels": ["no", "yes"]}
    trained = make_run(tiny_llama, **QLORA)
    method = {**QLORA["method"], "init_from": str(trained)}
    data = {"train": {"path": str(labels)}, "eval": {"path": str(labels)}}
    labelled = tiny_config(tiny_llama, tmp_path / "labelled", method=method, train=STILL, data=data, task=task)
    assert errors(pools, labelled, world=2) == ["", ""]
    summary = json.loads((tmp_path / "labelled" / "summary.json").read_text())
    assert summary["base_eval_loss"] == pytest.approx(math.log(2), rel=1e-5)
    back = tiny_config(tiny_llama, tmp_path / "back", train=STILL, method=dict(method, init_from=labelled.output_dir))
    assert errors(pools, back, world=2) == ["", ""]
    for path, update in updates(trained).items():
        torch.testing.assert_close(updates(back.output_dir)[path], update, rtol=1e-5, atol=1e-7)


def _drop_a_layer(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    gone = next(iter(tensors)).rpartition(".lora_")[0]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    save_file(kept, folder / "adapter_model.safetensors")


def _with(folder, changes, refusal):
    path = folder / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **changes}))
    try:
        return refusal(folder)
    finally:
        path.write_text(before)
