"""A run on what users bring: a base without chat template, several data sets with weights, rows that cannot be used."""

import json

from transformers import AutoTokenizer

import dist_qft
from dist_qft.storage.checkpoint import list_checkpoints, read_checkpoint
from dist_qft.training.metrics_file import read_history
from tests.support.merges import merge_run
from tests.support.outcomes import attempt
from tests.support.tiny_model import save_tiny_model, tiny_config, write_data
from tests.support.whole_runs import adapter_digest, train_losses

ALPACA = [{"instruction": f"Add {i}", "input": f"{i} 1", "output": f"the cat {i + 1}"} for i in range(20)]
CLOCK = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def test_base_model_on_alpaca_rows_and_others(pools, tmp_path):
    model = save_tiny_model(tmp_path / "base")
    (model / "chat_template.jinja").unlink()
    rows = "".join(json.dumps(row) + "\n" for row in ALPACA) + "{torn\n"
    (tmp_path / "alpaca.jsonl").write_text(rows)
    train = [
        {"path": str(tmp_path / "alpaca.jsonl"), "weight": 3.0},
        {"path": str(write_data(tmp_path / "plain.jsonl", 10)), "weight": 1.0},
    ]
    data = {"train": train, "template": "alpaca", "on_bad_row": "skip", "max_bad_rows": 0.1, "max_source_length": 90}
    data |= {"max_length": 256}
    sections = {"data": data, "train": {"max_steps": 4}, "checkpoint": {"save_steps": 2}}
    config, again = (tiny_config(model, tmp_path / name / "run", **sections) for name in ("a", "b"))
    losses = pools[1].run(train_losses, config=config)[0]
    half = again.model_copy(update={"train": again.train.model_copy(update={"max_steps": 2})})
    pools[2].run(train_losses, config=half)
    resumed = pools[1].run(train_losses, config=again, resume="auto")[0]
    assert len(losses) == 4 and [round(loss, 4) for loss in resumed] == [round(loss, 4) for loss in losses]

    pools[1].run(merge_run, source=config.output_dir, target="dense", path=tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add 3"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("### Instruction:\nAdd 3\n\n### Response:\n")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "alpaca.jsonl, plain.jsonl" in card and "prompt template alpaca" in card
    run, merged = dist_qft.load(config.output_dir), dist_qft.load(tmp_path / "dense")
    assert run.generate("Add 3", 6) == merged.generate("Add 3", 6)


def test_a_run_on_another_day_sees_the_same_date(pools, tmp_path):
    """Templates print the date; a run keeps the one that it began with."""
    model = save_tiny_model(tmp_path / "base")
    (model / "chat_template.jinja").write_text(CLOCK)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"data": {"train": {"path": str(tmp_path / "d.jsonl")}}, "train": {"max_steps": 2}}
    config = tiny_config(model, tmp_path / "run", **sections)
    old = config.model_copy(update={"data": config.data.model_copy(update={"date": "2001-02-03"})})
    assert [outcome.error for outcome in pools[1].run(attempt, config=old)] == [""]
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 3})})
    assert [outcome.error for outcome in pools[1].run(attempt, config=longer, resume="auto")] == [""]
    state = read_checkpoint(list_checkpoints(tmp_path / "run")[-1]).state
    assert state.step == 3 and state.config["data"]["date"] == "2001-02-03"
    assert len(read_history(tmp_path / "run")) == 3 and adapter_digest(tmp_path / "run")
