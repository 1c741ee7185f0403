"""The source that a path means, refusals before reading, and the content that a source's digest depends on."""

import os
from collections import Counter

import pytest

from dist_qft.config.data_schema import DatasetConfig
from dist_qft.data.sources import _open_hub, load_records, open_data_source
from dist_qft.errors import UserError


def records(dataset):
    counts = Counter()
    source = open_data_source(dataset, "data.train")
    return list(load_records(dataset, source, "data.train", counts)), counts


def test_limit_counts_and_reads_no_further(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\nmalformed')
    located, counts = records(DatasetConfig(path=str(path), limit=2))
    assert [record["text"] for record, _ in located] == ["a", "b"]
    assert counts == {"read": 2, "blank_lines": 1}


def test_only_blank_lines_is_no_data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n\n")
    with pytest.raises(UserError) as caught:
        records(DatasetConfig(path=str(path)))
    assert str(caught.value) == f"data.train.path: {path} holds no records (3 blank lines)"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split": "test"},
            "data.train.split: {path} is one file and has no splits; name the wanted file in data.train.path",
        ),
        ({"name": "main"}, "data.train.name: {path} is local and has none; name the wanted file in data.train.path"),
    ],
)
def test_settings_that_a_local_file_would_ignore(tmp_path, settings, message):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError) as caught:
        open_data_source(DatasetConfig(path=str(path), **settings), "data.train")
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/missing/folder", "sub/missing.parquet"])
def test_what_looks_like_a_file_is_not_asked_of_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data.train.path: no such file or folder: .*missing"):
        open_data_source(DatasetConfig(path=path), "data.train")


def test_digest_follows_content_not_time(tmp_path):
    path = tmp_path / "a.jsonl"
    dataset = DatasetConfig(path=str(path))

    def digest(text):
        path.write_text(text)
        return open_data_source(dataset, "data.train").digest

    first = digest('{"a": 1}\n{"a": 2}\n')
    os.utime(path, (0, 0))
    assert open_data_source(dataset, "data.train").digest == first
    assert digest('{"a": 2}\n{"a": 1}\n') != first  # reordered
    assert digest('{"a": 1}\n') != first  # cut
    assert digest('{"a": 1}\n{"a": 2}\n') == first


def test_stdlib_docs_splits():
    assert open_data_source(DatasetConfig(path="stdlib-docs", split="eval"), "data.eval").digest
    with pytest.raises(UserError) as caught:
        open_data_source(DatasetConfig(path="stdlib-docs", split="test"), "data.eval")
    assert str(caught.value) == "data.eval.split: got 'test', must be train or eval for stdlib-docs"


@pytest.fixture
def offline_datasets(tmp_path, monkeypatch):
    """`datasets` with its own cache and no network, by its own settings."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_hub_id_that_cannot_be_had(offline_datasets):
    with pytest.raises(UserError) as caught:
        open_data_source(DatasetConfig(path="nobody/no-such-data"), "data.train")
    assert str(caught.value).startswith(
        "data.train.path: 'nobody/no-such-data' is not a local file, and loading it from the Hub failed: Couldn't reach"
    )


@pytest.fixture
def repository(tmp_path):
    """A data set laid out as on the Hub, which `datasets` builds from a folder by the same code."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    return folder


def test_hub_splits(offline_datasets, repository):
    def texts(split):
        dataset = DatasetConfig(path=str(repository), split=split)
        source = _open_hub(dataset, "data.train")
        assert source.digest == _open_hub(dataset, "data.train").digest
        return list(load_records(dataset, source, "data.train", Counter()))

    assert texts("train") == [
        ({"text": "a"}, f"{repository} (train): record 1"),
        ({"text": "b"}, f"{repository} (train): record 2"),
    ]
    assert texts("test") == [({"text": "c"}, f"{repository} (test): record 1")]
    with pytest.raises(UserError, match=r"^data.train.split: got 'validation', must be test, train for "):
        texts("validation")


def test_hub_name_that_does_not_exist(offline_datasets, repository):
    with pytest.raises(UserError, match=r"loading it from the Hub failed: BuilderConfig 'french' not found"):
        _open_hub(DatasetConfig(path=str(repository), name="french"), "data.train")


CONFIGS = """---
configs:
- {config_name: main, data_files: train.jsonl}
- {config_name: socratic, data_files: test.jsonl}
---
"""


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("README.md", CONFIGS, "['main', 'socratic']"),
        ("repository.py", "", "Dataset scripts are no longer supported, but found repository.py"),
    ],
)
def test_a_refusal_of_the_hub_keeps_its_reason(offline_datasets, repository, name, content, reason):
    (repository / name).write_text(content)
    with pytest.raises(UserError) as caught:
        _open_hub(DatasetConfig(path=str(repository)), "data.train")
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_columns_of_pictures_that_nobody_reads_are_not_decoded(offline_datasets, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "page": datasets.Image()})
    rows = {"text": ["a"], "page": [{"bytes": b"no picture", "path": None}]}
    folder = tmp_path / "pictures"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    dataset = DatasetConfig(path=str(folder))
    ((record, _),) = load_records(dataset, _open_hub(dataset, "data.train"), "data.train", Counter())
    assert record == {"text": "a", "page": {"bytes": "bm8gcGljdHVyZQ=="}}
