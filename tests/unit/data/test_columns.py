"""Columns that are named and not there, and columns that are there and not read."""

import pytest

from dist_qft.config.data_schema import DatasetConfig
from dist_qft.errors import UserError

ROW = {"instruction": "Hello", "output": "Goodbye"}


@pytest.mark.parametrize("field", ["system", "input", "output"])
def test_a_column_that_no_row_has_is_refused(run, corpus, tmp_path, field):
    rows = [{**ROW, "sys": "Hi"}] * 2
    with pytest.raises(UserError) as caught:
        run(DatasetConfig(path=corpus(rows), columns={field: "sytem"}))
    expected = "got 'sytem', must be a column of the data; the first row has: instruction, output, sys"
    assert str(caught.value) == f"data.train.columns.{field}: {expected}"
    assert not (tmp_path / "cache" / "tokens").exists() or not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_column_that_a_later_row_has_is_used(run, corpus, chatml):
    dataset = DatasetConfig(path=corpus([ROW, {**ROW, "sys": "Be kind"}]), columns={"system": "sys"})
    prepared = run(dataset)
    texts = [chatml.decode(prepared.train.row(index).tokens) for index in range(2)]
    assert ["Be kind" in text for text in texts] == [False, True] and prepared.train.counts["read"] == 2
    with pytest.raises(UserError, match=r"^data.train.columns.system"):
        run(dataset.model_copy(update={"limit": 1}))


def test_columns_that_are_not_read_are_told_in_one_line(run, corpus):
    extra = {"source": "x", "category": "y", "id": 3, "row_id": 4, "Unnamed: 0": 5, "empty": None, "functions": []}
    rows = [{**ROW, **extra, "empty": ""}, {**ROW, "context": "z", "history": []}]
    for _ in range(2):  # built, and from the cache
        assert run(corpus(rows)).notes() == ["data.train: columns not used: category, context, source"]
    both = [DatasetConfig(path=corpus(rows, name)) for name in ("a.jsonl", "b.jsonl")]
    assert [note.partition(":")[0] for note in run(corpus([ROW]), eval=both).notes()] == [
        "data.eval[0]",
        "data.eval[1]",
    ]
    renamed = DatasetConfig(
        path=corpus([{"question": "a", "prompt": "b", "completion": "c"}]), columns={"prompt": "question"}
    )
    assert run(renamed).notes()[0] == "data.train: columns not used: prompt"
