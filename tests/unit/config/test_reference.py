"""The page of every config key, and the JSON schema that editors read."""

import json
import re
from pathlib import Path

import pytest

from dist_qft.config.load import load_config
from dist_qft.config.reference import config_page, config_schema, undescribed
from dist_qft.config.validation import OTHER_NAMES
from dist_qft.errors import UserError

PAGE = Path(__file__).resolve().parents[3] / "docs/config.md"


def test_the_page_of_config_keys_is_current():
    assert PAGE.read_text() == config_page(), "run: python -m dist_qft.config.reference >docs/config.md"


def test_every_config_key_is_described():
    assert undescribed(config_schema()) == [], "give the new key a description in its Field"


def test_the_command_prints_the_schema(shell):
    code, out, err = shell("config-schema")
    assert (code, json.loads(out), err) == (0, config_schema(), "")


def test_names_of_other_programs_lead_to_keys_that_exist(tmp_path):
    names = {"lora_r": "method.rank", "adapter": "method.name", "micro_batch_size": "train.per_device_train_batch_size"}
    names |= {"qalora_group_size": "method.pool", "bnb_4bit_use_double_quant": "quantization.double_quant"}
    names |= OTHER_NAMES
    page = PAGE.read_text()
    for name, key in names.items():
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: a\nmodel: {{path: b}}\n{name}: 1\n")
        with pytest.raises(UserError, match=f"unknown key '{name}', did you mean '{re.escape(key)}'"):
            load_config(path)
        assert f"| `{key.rpartition('.')[2]}` |" in page
