"""From config to cached data: counts, refusals, when the cache is used, and when not."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_qft.config.data_schema import DataConfig, DatasetConfig
from dist_qft.data.batches import Batches
from dist_qft.data.holding_out import held_out_indices
from dist_qft.data.prepare import prepare
from dist_qft.data.templates import use_template
from dist_qft.errors import UserError


def tokenized(*lengths):
    return [{"input_ids": [1] * n} for n in lengths]


def row_tokens(dataset):
    return [dataset.row(i).tokens.tolist() for i in range(len(dataset))]


def test_counts_of_every_fate(run, corpus):
    records = [
        *tokenized(4, 12, 8),
        {"input_ids": [1] * 12, "labels": [-100] * 10 + [1] * 2},  # its targets lie behind the cut
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [1]},  # nothing to predict
    ]
    path = corpus(records)
    prepared = run(path, max_length=8)
    assert prepared.train.counts == {
        "read": 6,
        "blank_lines": 0,
        "truncated": 1,
        "dropped_targets_cut_off": 1,
        "dropped_no_targets": 2,
        "kept": 3,
        "rows": 3,
        "tokens": 20,
        "target_tokens": 17,
    }
    assert prepared.eval is None
    assert prepared.train.pad_id == 0
    dropped = run(path, max_length=8, overlong="drop").train.counts
    assert (dropped["kept"], dropped["dropped_overlong"], dropped["truncated"]) == (2, 2, 0)
    with pytest.raises(UserError, match=r"train.jsonl:2: got 12 tokens, must be at most data.max_length 8"):
        run(path, max_length=8, overlong="error")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"input_ids": [1, 2], "labels": [-100, -100]}] * 3, "dropped_no_targets 3, read 3"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], "dropped_no_targets 1, read 1"),
        (tokenized(20, 30), "dropped_overlong 2, read 2"),
    ],
)
def test_nothing_to_train_on(run, corpus, records, message):
    path = corpus(records)
    with pytest.raises(UserError) as caught:
        run(path, max_length=8, overlong="drop")
    assert str(caught.value) == f"data.train: no sample of {path} has a token to train on ({message})"
    assert caught.value.exit_code == 2


def test_fault_in_a_later_record_names_its_line(run, corpus, tmp_path):
    path = corpus([{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(UserError) as caught:
        run(path)
    assert str(caught.value) == f"{path}:2: field 'completion' is missing; the record has: prompt"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_eval_samples_are_held_out_once_and_for_all(run, corpus):
    path = corpus([{"input_ids": [i, i, i]} for i in range(100)])
    prepared = run(path, eval_samples=10)
    train, held_out = row_tokens(prepared.train), row_tokens(prepared.eval)
    assert (len(train), len(held_out)) == (90, 10)
    assert sorted(train + held_out) == [[i, i, i] for i in range(100)]
    assert [row[0] for row in held_out] == sorted(held_out_indices(100, 10))
    assert held_out_indices(100, 10) < held_out_indices(100, 20)
    assert (prepared.train.counts["held_out"], prepared.eval.counts["kept"]) == (10, 10)
    packed = run(path, eval_samples=10, packing=True, max_length=30)
    assert (len(packed.eval), len(packed.train)) == (1, 9)
    for wanted in (100, 1000):
        with pytest.raises(UserError, match=rf"^data.eval_samples: got {wanted}, must be at most 99 of the 100"):
            run(path, eval_samples=wanted)


def test_eval_data_set(run, corpus):
    path = corpus(tokenized(5, 6))
    other = DatasetConfig(path=corpus(tokenized(3), "eval.jsonl"))
    prepared = run(path, eval=other)
    assert [len(row) for row in row_tokens(prepared.eval)] == [3]
    with pytest.raises(UserError, match=r"^data.eval.path: no such file or folder: .*gone.jsonl$"):
        run(path, eval=DatasetConfig(path="gone.jsonl"))


def cache_files(tmp_path):
    return {file.name: file.stat().st_ino for file in (tmp_path / "cache" / "tokens").glob("*.safetensors")}


def test_cache_is_used_until_something_that_matters_changes(run, corpus, tmp_path, make_tokenizer):
    records = [{"text": "Hello there"}, {"text": "The quick brown fox"}]
    path = corpus(records)
    first = run(path)
    files = cache_files(tmp_path)
    assert len(files) == 1
    again = run(path)
    assert cache_files(tmp_path) == files  # not written again: the same inode
    assert (again.train.digest, again.train.counts) == (first.train.digest, first.train.counts)

    other_tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    other_template = make_tokenizer("{{ messages }}")
    for changed in (
        {"max_length": 64},
        {"packing": True},
        {"vocab_size": 331},
        {"tokenizer": other_tokenizer},
        {"tokenizer": other_template},
    ):
        before = len(cache_files(tmp_path))
        run(path, **changed)
        assert len(cache_files(tmp_path)) == before + 1, changed
    corpus(records[::-1])
    assert row_tokens(run(path).train) == row_tokens(first.train)[::-1]


def test_padding_or_truncating_calls_keep_the_cache(run, corpus, tmp_path, make_tokenizer):
    path, tokenizer = corpus([{"text": "Hello there"}]), make_tokenizer()
    run(path, tokenizer=tokenizer)
    tokenizer("Hello there", truncation=True, max_length=2, padding="max_length")
    run(path, tokenizer=tokenizer)
    assert len(cache_files(tmp_path)) == 1


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content[:-3] + b"abc", lambda _: b""])
def test_damaged_cache_is_rebuilt(run, corpus, tmp_path, damage):
    path = corpus([{"text": "Hello there"}, {"text": "Goodbye"}])
    digest = run(path).train.digest
    (file,) = (tmp_path / "cache" / "tokens").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert run(path).train.digest == digest
    assert file.read_bytes() == content


def test_several_at_once_write_one_file(run, corpus, tmp_path):
    path = corpus([{"text": f"Hello there {i}"} for i in range(200)])
    barrier = threading.Barrier(4)

    def start():
        barrier.wait()
        prepared = run(path, eval_samples=20)
        return prepared.train.digest, prepared.eval.digest

    with ThreadPoolExecutor(4) as pool:
        results = {future.result() for future in [pool.submit(start) for _ in range(4)]}
    assert len(results) == 1
    assert sorted(name.rpartition("-")[2] for name in cache_files(tmp_path)) == [
        "eval.safetensors",
        "train.safetensors",
    ]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_smollm2_on_stdlib_docs(smollm2, tmp_path):
    train = DatasetConfig(path="stdlib-docs", limit=40)
    prepared = prepare(DataConfig(train=train, max_length=256), smollm2, 49152, tmp_path)
    assert prepared.train.counts["kept"] == 40
    row = prepared.train.row(0)
    text, predicted = smollm2.decode(row.tokens), smollm2.decode(row.tokens[row.targets])
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(f"<|im_start|>assistant\n{predicted}\n")
    assert predicted.endswith("<|im_end|>")


def conversation(answer="Paris", **extra):
    return {"messages": [{"role": "user", "content": "where"}, {"role": "assistant", "content": answer, **extra}]}


def test_what_the_template_leaves_out_is_told_also_from_the_cache(run, corpus):
    path = corpus([conversation(), conversation(reasoning_content="thinking"), conversation(reasoning_content="more")])
    for _ in range(2):
        (note,) = run(path, on_missing="warn").notes()
        assert note.startswith("data.train: ") and "reasoning (2 of 3 rows" in note and "train.jsonl:2" in note


def test_what_was_dropped_and_cut_is_told(run, corpus):
    prepared = run(corpus([*tokenized(12, 12, 8), {"input_ids": [1]}]), max_length=8)
    (note,) = prepared.notes()
    assert note == "data.train: of 4 rows 1 dropped, without a token to train on; 2 cut to data.max_length"
    assert run(corpus(tokenized(8, 8), "fine.jsonl"), max_length=8).notes() == []


PLAIN = {"prompt": "Hello", "completion": " there"}


def test_a_template_that_no_row_gets_is_refused(run, corpus, make_tokenizer):
    alpaca = use_template(make_tokenizer(), "alpaca")
    for rows in ([PLAIN], [{"text": "Hello"}], tokenized(4)):
        with pytest.raises(UserError, match=r"^data.template: got alpaca, .* but the data have none"):
            run(corpus(rows), alpaca, template="alpaca")
    held_out = DatasetConfig(path=corpus([conversation()], "eval.jsonl"))
    assert run(corpus([PLAIN]), alpaca, template="alpaca", eval=held_out).notes() == []
    assert run(corpus([{"instruction": "Hello", "output": "there"}]), alpaca, template="alpaca").notes() == []


def bad_rows(count, good):
    """Rows with every kind of fault among good ones."""
    faults = [{"messages": "x"}, {"other": 1}, conversation("\ud800"), {"messages": []}]
    return [conversation() for _ in range(good)] + [faults[index % len(faults)] for index in range(count)]


def test_rows_that_cannot_be_used_end_the_run_or_are_skipped_and_named(run, corpus, tmp_path):
    path = corpus(bad_rows(12, 88))
    with pytest.raises(UserError, match=r"train.jsonl:89"):
        run(path)
    prepared = run(path, on_bad_row="skip", max_bad_rows=0.2)
    assert prepared.train.counts["skipped"] == 12 and len(prepared.train) == 88
    told = "\n".join(prepared.notes())
    assert "12 of 100 rows" in told and told.count("train.jsonl:") == 10 and "12 skipped" in told
    with pytest.raises(UserError, match=r"12 of 100 rows(.|\n)*max_bad_rows"):
        run(path, on_bad_row="skip")
    torn = tmp_path / "torn.jsonl"
    torn.write_text(json.dumps(conversation()) + "\n{\n" + json.dumps(conversation()) + "\n")
    assert len(run(str(torn), on_bad_row="skip", max_bad_rows=0.5).train) == 2


def test_several_held_out_data_sets_are_used_whole(run, corpus):
    texts = [[{"text": f"Hello {name} {index}"} for index in range(3)] for name in ("a", "b")]
    first, second = (corpus(rows, f"{index}.jsonl") for index, rows in enumerate(texts))
    both = run(first, eval=[{"path": first}, {"path": second, "limit": 2}]).eval
    alone = [run(first, eval={"path": path, "limit": limit}).eval for path, limit in ((first, 3), (second, 2))]
    assert len(both) == both.counts["kept"] == 5
    rows = [part.row(index).tokens.tolist() for part in alone for index in range(len(part))]
    assert [both.row(index).tokens.tolist() for index in range(5)] == rows


def test_several_data_sets_with_weights(run, corpus, tmp_path, chatml):
    files = [corpus([{"input_ids": [5, 5, 5]}] * 30, "a.jsonl"), corpus([{"input_ids": [7, 7]}] * 10, "b.jsonl")]

    def prepared(*weights, **settings):
        train = [DatasetConfig(path=path, weight=weight) for path, weight in zip(files, weights, strict=True)]
        return prepare(DataConfig(train=train, **settings), chatml, 330, tmp_path / "cache")

    together = prepared(None, None).train
    assert len(together) == 40 and not together.mixture and together.counts["read"] == 40
    mixed = prepared(1, 3, eval_samples=4)
    assert mixed.train.mixture[1].weight == 3 and len(mixed.train) == 36 and len(mixed.eval) == 4
    batches = Batches(mixed.train, 0, 4, 1, 0, 1, 36)
    rows = [mixed.train.row(row).tokens[0] for step in range(9) for row in batches.row_ids(step)]
    assert rows.count(7) == 27 and "27 of data.train[1]" in mixed.notes()[-1]
    with pytest.raises(UserError, match=r"^data.train\[1\].weight"):
        prepared(1, 1e-6)


def test_a_date_is_part_of_the_tokens(run, corpus, make_tokenizer):
    clock = make_tokenizer(
        "{{ strftime_now('%d %B') }}{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    )
    path = corpus([conversation()])
    days = ["2024-07-26", "2024-07-26", "2024-07-27"]
    texts = [clock.decode(run(path, clock, date=day).train.tokens) for day in days]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("26 July")
