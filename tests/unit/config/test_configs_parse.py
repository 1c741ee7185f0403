"""The shipped configs: each one loads, and each of their keys, once misspelt, is refused at its line."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_qft.config.check import accumulation_steps, config_warnings
from dist_qft.config.load import load_config
from dist_qft.errors import UserError
from dist_qft.sharding.engines import engine_warnings

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RANKS = {
    "smollm2": (1, 2, 4),
    "llama-8b": (8,),
    "qwen3-8b": (1, 2),
    "llama-70b": (16,),
    "llama2-7b": (4,),
    "llama2-70b": (4,),
    "configs": (2,),
}  # by folder

# One edit each: a letter lost, a letter doubled, a letter replaced.
MISSPELLINGS: dict[str, Callable[[str], str]] = {
    "lost": lambda key: key[:-2] + key[-1],
    "doubled": lambda key: key[:2] + key[1:],
    "replaced": lambda key: key[:-1] + "z",
}

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))


def keys_of(text: str) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    """(line index, key path, whether it opens a section) of block-style YAML indented by two spaces."""
    path: list[str] = []
    for index, line in enumerate(text.splitlines()):
        if match := re.match(r"( *)(\w+):(.*)", line):
            indent, key, rest = match.groups()
            path[len(indent) // 2 :] = [key]
            yield index, tuple(path), not rest.split("#")[0].strip()


def test_there_is_a_config_for_every_method_and_size():
    names = {str(path.relative_to(ROOT / "configs")) for path in CONFIGS}
    methods = ("qlora", "qbara", "qalora", "qahira", "qablora")
    expected = {f"{folder}/{name}.yaml" for folder in ("smollm2", "llama-8b", "llama-70b") for name in methods}
    side = {f"{folder}/qst.yaml" for folder in ("smollm2", "llama2-7b", "llama2-70b")}
    gpu = {"qwen3-8b/qlora.yaml", "qwen3-8b/qahira-32k.yaml"}
    assert names == expected | side | gpu | {"quickstart.yaml", "smollm2/qst-classification.yaml", "smollm2/dpo.yaml"}


@every_config
def test_loads_without_warnings_and_divides_over_its_ranks(path):
    config = load_config(path)
    assert config_warnings(config) + engine_warnings(config) == []
    for world_size in RANKS[path.parent.name]:
        assert accumulation_steps(config, world_size) >= 1
    named = {"quickstart.yaml": "qahira", "dpo.yaml": "qlora"}.get(path.name, path.stem.partition("-")[0])
    assert config.method.name == named


@every_config
def test_every_setting_misspelt_is_refused_at_its_line(path, tmp_path):
    """All settings of the file at once; section names stay, or what is inside could not be judged."""
    misspell = list(MISSPELLINGS.values())[CONFIGS.index(path) % len(MISSPELLINGS)]
    lines = path.read_text().splitlines()
    expected = []
    copy = tmp_path / path.name
    for index, key, is_section in keys_of(path.read_text()):
        if not is_section:
            wrong = misspell(key[-1])
            lines[index] = lines[index].replace(key[-1], wrong, 1)
            given, meant = ".".join([*key[:-1], wrong]), ".".join(key)
            expected.append(f"{copy}:{index + 1}: unknown key '{given}', did you mean '{meant}'?")
    copy.write_text("\n".join(lines))
    assert len(expected) > 15
    with pytest.raises(UserError) as refusal:
        load_config(copy)
    assert str(refusal.value).splitlines() == expected


@pytest.mark.parametrize("misspell", MISSPELLINGS.values(), ids=MISSPELLINGS)
def test_every_section_misspelt_is_refused_at_its_line(misspell, tmp_path):
    path = ROOT / "configs" / "smollm2" / "qahira.yaml"
    text = path.read_text()
    copy = tmp_path / path.name
    sections = [(index, key) for index, key, is_section in keys_of(text) if is_section]
    assert {key[0] for _, key in sections} >= {"model", "method", "data", "train", "sharding", "evaluation"}
    for index, key in sections:
        lines = text.splitlines()
        wrong = misspell(key[-1])
        lines[index] = lines[index].replace(key[-1], wrong, 1)
        copy.write_text("\n".join(lines))
        with pytest.raises(UserError) as refusal:
            load_config(copy)
        given = ".".join([*key[:-1], wrong])
        assert f"{copy}:{index + 1}: unknown key '{given}', did you mean '{'.'.join(key)}'?" in str(refusal.value)


@every_config
def test_settings_moved_out_of_their_section_are_sent_back(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_text(path.read_text() + "learning_rate: 1.0e-4\n")
    with pytest.raises(UserError, match=r"unknown key 'learning_rate', did you mean 'train\.learning_rate'\?$"):
        load_config(copy)
