"""Texts with half of a surrogate pair, which an escape in YAML can write and no file can hold."""

import pytest

from dist_qft.config.load import change_config, load_config
from dist_qft.errors import UserError


def test_such_texts_are_refused_with_their_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text('output_dir: "runs/\\ud800"\nmodel: {path: x}\nevaluation: {prompts: [a, "b\\udfff"]}\n')
    with pytest.raises(UserError) as refused:
        load_config(path)
    lines = str(refused.value).splitlines()
    assert [line.removeprefix(f"{path}:") for line in lines] == [
        r"1: output_dir: got '\ud800' in the text, must be Unicode characters",
        r"3: evaluation.prompts.1: got '\udfff' in the text, must be Unicode characters",
    ]


def test_a_change_is_refused_alike(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/a\nmodel: {path: x}\ndata: {train: {path: y}}\n")
    with pytest.raises(UserError, match=r"^model\.path: got "):
        change_config(load_config(path), {"model.path": "x\udcff"})
