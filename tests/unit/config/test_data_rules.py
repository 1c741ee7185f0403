"""Rules of the section `data`, and paths with `~` and `$VAR`."""

import re
from pathlib import Path

import pytest

from dist_qft.config.load import load_config, save_config
from dist_qft.errors import UserError

BASE = "output_dir: out\nmodel: {path: m}\n"


def load(tmp_path, data="{train: {path: a.jsonl}}", *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(f"{BASE}data: {data}\n")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("{train: []}", "data.train"),
        ("{train: [{path: a, pth: b}]}", "data.train.0.pth"),
        ("{train: {path: a, pth: b}}", "data.train.pth"),
        ("{train: [{path: 3}]}", "data.train.0.path"),
        ("{train: [{}]}", "data.train.0.path"),
        ("{train: 3}", "data.train"),
        ("{train: [{path: a, weight: 0}]}", "data.train.0.weight"),
        ("{train: [{path: a, weight: 1}, {path: b}]}", "data.train.1.weight"),
        ("{train: [{path: a, weight: 1}]}", "data.train.0.weight"),
        ("{train: {path: a, weight: 1}}", "data.train.weight"),
        ("{train: {path: a}, eval: {path: b, weight: 2}}", "data.eval.weight"),
        ("{train: {path: a}, eval: [{path: b}, {path: c, weight: 2}]}", "data.eval.1.weight"),
        ("{train: {path: a}, eval: []}", "data.eval"),
        ("{train: {path: a}, eval: [{path: b, format: classification}]}", "data.eval.0.format"),
        ("{train: [{path: a}, {path: b, format: classification}]}", "data.train.1.format"),
        ("{train: {path: a}, date: yesterday}", "data.date"),
        ("{train: {path: a}, max_bad_rows: 0.5}", "data.max_bad_rows"),
        ("{train: {path: a}, loss_on: all, max_source_length: 5}", "data.max_source_length"),
        ("{train: {path: a}, template: chatml}", "data.template"),
        ("{train: {path: '$NO_SUCH_NAME/a'}}", "data.train.path"),
        ("{train: {path: a}, cache_dir: '${NO_SUCH_NAME}'}", "data.cache_dir"),
    ],
)
def test_what_makes_no_sense_is_refused_by_key(tmp_path, data, key):
    with pytest.raises(UserError, match=rf"(: |'){key}\b"):
        load(tmp_path, data)


def test_several_data_sets_survive_saving_and_overriding(tmp_path):
    sets = "{train: [{path: a, weight: 1}, {path: b, weight: 2.5}], eval: [{path: c}, {path: d}]}"
    config = load(tmp_path, sets, "data.train.1.limit=4")
    assert list(config.data.train_sets()) == ["data.train[0]", "data.train[1]"]
    assert list(config.data.eval_sets()) == ["data.eval[0]", "data.eval[1]"]
    assert config.data.train[1].limit == 4
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/mnt/data")
    monkeypatch.setenv("HOME", "/home/me")
    config = load(tmp_path, "{train: {path: $PLACE/a.jsonl}, cache_dir: ~/c}", "output_dir=~/out", "merge.at_end=gguf",
                  "merge.path=${PLACE}/x.gguf", "model.path=~/models/tiny")  # fmt: skip
    assert config.data.train.path == "/mnt/data/a.jsonl" and config.data.cache_dir == "/home/me/c"
    assert (config.output_dir, config.merge.path) == ("/home/me/out", "/mnt/data/x.gguf")
    assert Path(config.model.path) == Path("/home/me/models/tiny")
    with pytest.raises(UserError, match=r"output_dir.*got '~no-such-user/out'"):
        load(tmp_path, "{train: {path: a}}", "output_dir=~no-such-user/out")


@pytest.mark.parametrize(
    "change",
    [
        "train.seed=18446744073709551616", "train.global_batch_size=1000000000000",
        "train.max_steps=9223372036854775808",
        "sharding.timeout_seconds=9999999999", "sharding.rank0_timeout_seconds=9999999999",
        "sharding.bucket_megabytes=1e308", "train.loss_chunk_megabytes=1e308", "sharding.prefetch_megabytes=1e308",
        "method.alpha=1e308", "train.learning_rate=1e308",
    ],
)  # fmt: skip
def test_what_no_type_of_a_library_holds_is_refused_by_key(tmp_path, change):
    with pytest.raises(UserError, match=re.escape(change.partition("=")[0])) as refusal:
        load(tmp_path, "{train: {path: a}}", change)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_seed_may_be_large(tmp_path):
    assert load(tmp_path, "{train: {path: a}}", "train.seed=9223372036854775807").train.seed == 2**63 - 1


def test_a_file_of_settings_that_goes_on_and_on_is_refused(tmp_path):
    with pytest.raises(UserError, match="/dev/zero: cannot read the config: more than 16 MiB"):
        load_config("/dev/zero")
    with pytest.raises(UserError, match="cannot read '/dev/zero': more than 16 MiB"):
        load(tmp_path, "{train: {path: a}}", "sharding.engine=zero", "sharding.deepspeed_config=/dev/zero")


def test_thousands_of_faults_are_told_in_a_screen_or_two(tmp_path):
    (tmp_path / "c.yaml").write_text(BASE + "".join(f"key{index}: 1\n" for index in range(3000)))
    with pytest.raises(UserError) as refusal:
        load_config(tmp_path / "c.yaml")
    lines = str(refusal.value).splitlines()
    assert len(lines) <= 101 and lines[-1] == f"and {3000 - len(lines) + 1} more"
    with pytest.raises(UserError) as refusal:
        load(tmp_path, "{train: {path: a}}", f"train.optim={'x' * 10**6}")
    assert len(str(refusal.value)) < 3000


def test_a_date_needs_no_quotes(tmp_path):
    assert load(tmp_path, "{train: {path: a.jsonl}, date: 2025-01-31}").data.date == "2025-01-31"
    assert load(tmp_path, "{train: {path: a.jsonl}}", "data.date=2025-02-01").data.date == "2025-02-01"
    with pytest.raises(UserError, match=r"data\.date: got 2025 \(int\), must be a string"):
        load(tmp_path, "{train: {path: a.jsonl}, date: 2025}")
