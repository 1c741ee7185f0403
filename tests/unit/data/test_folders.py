"""Folders of data: splits by the names of files, clones of Hub repositories, what `save_to_disk` writes."""

import json
from collections import Counter

import pytest

from dist_qft.config.data_schema import DatasetConfig
from dist_qft.data.sources import load_records, open_data_source
from dist_qft.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Makes files with one row each, which names its file."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n")
        return tmp_path

    return make


def texts(path, split="train"):
    source = open_data_source(DatasetConfig(path=str(path), split=split), "data.train")
    records = load_records(DatasetConfig(path=str(path)), source, "data.train", Counter())
    return [record["text"] for record, _ in records], source.notes


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (
            ["train-00001-of-2.jsonl", "train-00000-of-2.jsonl", "dev.jsonl"],
            "train",
            ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl"],
        ),
        (["alpaca_val.jsonl", "alpaca_TRAIN.jsonl"], "validation", ["alpaca_val.jsonl"]),
        (["rows.jsonl", "eval.jsonl"], "train", ["rows.jsonl"]),
        (["rows.jsonl", "eval.jsonl"], "evaluation", ["eval.jsonl"]),
        (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["contest.jsonl", "trainer.jsonl"], "train", ["contest.jsonl", "trainer.jsonl"]),
        (["extra-part.jsonl", "train.jsonl"], "part", ["extra-part.jsonl"]),
        (["data/train-0.jsonl", "data/test-0.jsonl"], "test", ["data/test-0.jsonl"]),
        (["a.ndjson", "b.ndjson"], "train", ["a.ndjson", "b.ndjson"]),
    ],
)
def test_a_split_is_the_files_that_are_named_after_it(folder, names, split, expected):
    found, notes = texts(folder(*names), split)
    assert found == expected
    assert bool(notes) == (len(names) > len(expected))


@pytest.mark.parametrize(
    ("names", "split"), [(["test.jsonl"], "train"), (["a.jsonl"], "test"), (["train.jsonl", "a.jsonl"], "validation")]
)
def test_a_split_that_no_file_is_named_after_is_refused(folder, names, split):
    with pytest.raises(UserError, match=f"^data.train.split: .* has no split '{split}'"):
        texts(folder(*names), split)


def test_the_same_data_compressed_or_a_table_beside_it_is_not_read(folder):
    assert texts(folder("rows.jsonl", "rows.ndjson", "labels.tsv", "rows.jsonl.gz"))[0] == ["rows.jsonl"]
    assert texts(folder("up/readme.tsv", "up/data.jsonl").joinpath("up"))[0] == ["up/data.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "told"),
    [
        (["rows.csv", "rows.jsonl"], "train", r"split train of .* \(1 .csv, 1 .jsonl\), .* such as '.*/\*.jsonl'$"),
        (
            ["data/a.jsonl", "data/b.jsonl", "data/a.csv"],
            "train",
            r"\(1 .csv, 2 .jsonl\),.* such as '.*/data/\*.jsonl'$",
        ),
        (["train.csv", "train.jsonl", "test.jsonl"], "train", r"such as '.*/train\*.jsonl'$"),
        (
            ["train-0.jsonl", "test-0.jsonl", "test-1.jsonl", "test.csv"],
            "test",
            r"'.*/test-\*.jsonl', without a split$",
        ),
        (["a.csv.gz", "a.jsonl.gz"], "train", r"\(1 .csv.gz, 1 .jsonl.gz\)"),
    ],
)
def test_a_split_in_several_file_types_is_not_read_twice(folder, names, split, told):
    place = folder(*names)
    with pytest.raises(UserError, match=f"^data.train.path: .*{told}") as caught:
        texts(place, split)
    # The pattern reads what it says, and no other split.
    pattern = str(caught.value).rpartition(" such as '")[2].partition("'")[0]
    beginning, _, kind = pattern.removeprefix(f"{place}/").partition("*")
    if not kind.endswith(".gz"):
        assert texts(pattern)[0] == [name for name in names if name.startswith(beginning) and name.endswith(kind)]


def test_a_pattern_that_fits_several_file_types_is_refused(folder):
    with pytest.raises(UserError, match=r"^data.train.path: the pattern .*rows.\* fits .* \(1 .csv, 1 .jsonl\)"):
        texts(folder("rows.csv", "rows.jsonl") / "rows.*")
    # Of several splits each may have a type of its own.
    assert texts(folder("train.jsonl", "test.csv"), "train")[0] == ["train.jsonl"]


def test_descriptions_of_a_repository_are_no_data(folder):
    place = folder("rows.jsonl")
    (place / "dataset_infos.json").write_text("{}")
    assert texts(place)[0] == ["rows.jsonl"]


def test_what_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": str(number)} for number in range(200)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert texts(tmp_path / "one")[0] == [str(number) for number in range(200)]
    datasets.DatasetDict({"train": rows, "dev": rows.select([3, 5])}).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "two", "validation")[0] == ["3", "5"]
    with pytest.raises(UserError, match=r"^data.train.split: .* has no split 'test'; it has train, dev"):
        texts(tmp_path / "two", "test")


@pytest.mark.parametrize("content", ["{}", "[]", "no", '{"_data_files": [{"filename": "../x.arrow"}]}'])
def test_a_damaged_description_is_one_line(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"^data.train.path: .*state.json"):
        texts(tmp_path)


@pytest.mark.parametrize("content", [b"no arrow file", b"\xff" * 64])
def test_a_damaged_arrow_file_is_one_line(tmp_path, content):
    (tmp_path / "x.arrow").write_bytes(content)
    with pytest.raises(UserError, match=r"x.arrow: not a readable Arrow file"):
        texts(tmp_path / "x.arrow")
