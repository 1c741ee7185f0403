"""Labels instead of tokens: from the data file to the metrics, for adapters and side networks alike."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_qft.config.data_schema import DataConfig, DatasetConfig, TaskConfig
from dist_qft.config.load import load_config
from dist_qft.data.batches import collate
from dist_qft.data.prepare import prepare
from dist_qft.errors import UserError
from dist_qft.plan import make_plan
from dist_qft.tuned_model.task import Labelling
from tests.support.tiny_model import tiny_config, tiny_tokenizer
from tests.support.whole_runs import adapter_digest, train, train_losses

TASK = TaskConfig(name="classification", labels=["cat", "dog", "sea"])
METHODS = {
    "qlora": {"name": "qlora", "rank": 8},
    "qst": {"name": "qst", "reduction": 4, "downsample_rank": 8},
}


def write_labelled(path: Path, count: int = 60) -> Path:
    """Texts whose label is the animal, or sea, that they name somewhere."""
    rows = []
    for i in range(count):
        label = TASK.labels[(i * 7) % 3]
        rows.append(
            {"text": f"the {'small ' * (i % 4)}{label} sat on green hills{' to see' * (i % 3)}", "label": label}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(folder: Path, rows: list[dict], task: TaskConfig = TASK, **data: object):
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=DatasetConfig(path=str(path), **data.pop("dataset", {})), **data)
    return prepare(config, tiny_tokenizer(), 320, folder / "cache", task).train


def test_labels_by_name_and_by_position_stand_at_the_last_token(tmp_path):
    rows = [{"text": "the cat sat", "label": "cat"}, {"text": "small dogs ran over hills", "label": 1}]
    dataset = prepared(tmp_path, rows)
    assert dataset.labels.tolist() == [0.0, 1.0]
    batch = collate(dataset, [1, 0], 3, 0)  # the third row only fills up
    assert batch.labels.tolist() == [1.0, 0.0]
    assert batch.row_ids == (1, 0)
    assert batch.num_targets == 2
    marked = (batch.targets != -100).nonzero().tolist()
    assert marked == [[0, len(dataset.row(1).tokens) - 1], [1, len(dataset.row(0).tokens) - 1]]


def test_pairs_are_joined_by_a_line_break_and_long_texts_cut(tmp_path):
    row = {"a": "the cat sat", "b": "on a mat", "y": "sea"}
    columns = {"text": "a", "text_pair": "b", "label": "y"}
    dataset = prepared(tmp_path, [row], dataset={"columns": columns})
    tokens = dataset.row(0).tokens
    assert tokens.tolist() == tiny_tokenizer()("the cat sat\non a mat")["input_ids"]
    cut = prepared(tmp_path, [row], dataset={"columns": columns}, max_length=8)
    assert cut.row(0).tokens.tolist() == tokens[:8].tolist()
    assert cut.row(0).targets.tolist() == [False] * 7 + [True]


@pytest.mark.parametrize(
    "task, label, message",
    [
        (TASK, "bird", "label: got 'bird', must be one of task.labels: cat, dog, sea, or a position from 0 to 2"),
        (TASK, 3, "label: got 3, must be one of task.labels"),
        (TASK, True, "label: got True, must be one of task.labels"),
        (TaskConfig(name="regression"), "high", "label: got 'high', must be a finite number"),
        (TaskConfig(name="regression"), 10**400, "must be a finite number"),
        (TaskConfig(name="regression"), 1e39, "label: got 1e+39, must be a finite number"),
        (TaskConfig(name="regression"), "inf", "label: got 'inf', must be a finite number"),
    ],
)
def test_labels_outside_the_set_are_refused_at_their_line(tmp_path, task, label, message):
    good = "cat" if task is TASK else 0.5
    with pytest.raises(UserError) as refusal:
        prepared(tmp_path, [{"text": "the cat", "label": good}, {"text": "the sea", "label": label}], task)
    assert str(refusal.value).startswith(f"{tmp_path / 'labelled.jsonl'}:2: ")
    assert message in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_a_record_without_a_label_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"labelled.jsonl:1: field 'label' is missing"):
        prepared(tmp_path, [{"text": "the cat"}])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["task={name: classification}"], "labels: got 0, must be at least 2 labels for classification"),
        (["task={name: classification, labels: [a, b, a]}"], "labels: got 'a' twice, must be different labels"),
        (["task.labels=[a, b]"], "causal-lm has no labels"),
        (["data.train.format=classification"], "got classification, must be another format with task causal-lm"),
        (["task.name=regression", "data.train.format=text"], "got text, must be classification with task regression"),
        (["task.name=regression", "data.packing=true"], "regression reads the last token of each row"),
        (["task.name=regression", "data.loss_on=all"], "regression predicts no tokens"),
        (["task.name=regression", "evaluation.prompts=[hi]"], "a model for regression"),
    ],
)
def test_settings_that_contradict_the_task(tmp_path, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/a\nmodel: {path: folder}\ndata: {train: {path: a.jsonl}}\n")
    with pytest.raises(UserError) as refusal:
        load_config(path, overrides)
    assert str(refusal.value).startswith(f"command line: {overrides[-1]}: ")
    assert message in str(refusal.value)


def test_loss_is_that_of_the_last_tokens(tmp_path):
    head = Labelling(3, 8, regression=False)
    torch.nn.init.normal_(head.score)
    dataset = prepared(tmp_path, [{"text": "the cat sat", "label": 2}, {"text": "green hills to see", "label": 0}])
    batch = collate(dataset, [0, 1], 3, 0)
    hidden = torch.randn(3, batch.input_ids.shape[1], 8)
    last = torch.stack([hidden[i, len(dataset.row(i).tokens) - 1] for i in range(2)])
    loss, predicted, _ = head.loss(hidden, batch)
    scores = last @ head.score.T
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.tensor([2, 0]), reduction="sum"))
    assert predicted[:2].tolist() == scores.argmax(1).tolist()
    assert predicted[2].isnan()


def test_metrics_of_labels():
    two = Labelling(2, 4, regression=False)
    true, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 0, 1, 0, 1, 0, 0, 1])
    metrics = two.metrics(predicted, true)
    assert metrics["accuracy"] == 6 / 8
    assert metrics["matthews"] == pytest.approx(np.corrcoef(true, predicted)[0, 1])  # of two labels they are the same
    assert metrics["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    three = Labelling(3, 4, regression=False)
    worked = three.metrics(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1]))
    # By hand: 3 of 4 right; R_K = (3*4 - (1*1 + 1*2 + 2*1)) / sqrt((16 - 6) (16 - 6)); F1 of 1, 2/3, 2/3.
    assert worked["matthews"] == pytest.approx(7 / 10)
    assert worked["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert three.metrics(np.zeros(3), np.arange(3))["matthews"] == 0.0


def test_metrics_of_numbers():
    head = Labelling(1, 4, regression=True)
    x = np.array([0.1, 0.4, 0.9, 0.3])
    assert head.metrics(x, 2 * x + 1) == {"pearson": pytest.approx(1.0)}
    assert head.metrics(np.ones(4), x) == {"pearson": 0.0}


def labelled_config(model: Path, folder: Path, method: str, **sections: dict):
    data = folder / "data.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        write_labelled(data)
    base = {"linear": "nf4", "block": [64]}
    train = {"max_steps": 30, "learning_rate": 1e-2, **sections.pop("train", {})}
    config = tiny_config(model, folder / "run", quantization=base, train=train, **sections)
    tree = config.model_dump(exclude_unset=True)
    tree["method"] = {name: value for name, value in METHODS[method].items() if value is not None}
    tree["task"] = TASK.model_dump()
    tree["data"] = {**tree["data"], "eval_samples": 12}
    return type(config).model_validate(tree)


def outcome(config):
    run = train(config)
    return run.evaluations.base, run.evaluations.tuned, run.flat.count


@pytest.mark.parametrize("method", METHODS)
def test_a_small_model_learns_to_label(pools, tiny_llama, tmp_path, shell, method):
    config = labelled_config(tiny_llama, tmp_path, method)
    before, after, trainables = pools[2].run(outcome, config=config)[0]
    assert trainables == make_plan(config, world_size=2).trainable_parameters
    assert before.loss == pytest.approx(math.log(3), rel=1e-5)  # the head starts at zero
    assert after.metrics["accuracy"] > 0.8
    assert after.tokens == 12
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert summary["tuned_eval_metrics"] == after.metrics
    assert set(after.metrics) == {"accuracy", "matthews", "f1"}
    found = json.loads(shell("eval", config.output_dir, "--json")[1])
    assert found["base"]["loss"] == pytest.approx(math.log(3), rel=1e-5)  # without the head that was trained
    assert found["tuned"]["loss"] == pytest.approx(after.loss, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_worlds_agree_and_resume_is_exact(pools, tiny_llama, tmp_path, method):
    def config(name: str, steps: int, engine: str = "fsdp"):
        sharding = {"engine": engine, "device": "cpu"}
        return labelled_config(tiny_llama, tmp_path / name, method, train={"max_steps": steps}, sharding=sharding)

    whole = pools[2].run(train_losses, config=config("whole", 6))[0]
    alone = pools[1].run(train_losses, config=config("alone", 6, "replicated"))[0]
    assert whole == pytest.approx(alone, rel=1e-4)
    pools[2].run(train_losses, config=config("parts", 3))
    pools[2].run(train_losses, config=config("parts", 6), resume="auto")
    assert adapter_digest(tmp_path / "whole" / "run") == adapter_digest(tmp_path / "parts" / "run")
