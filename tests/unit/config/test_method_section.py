"""The `method` section as a union of classes: what is read, what is refused, and configs of earlier versions."""

from pathlib import Path

import pytest

from dist_qft.config.check import config_warnings
from dist_qft.config.load import change_config, load_config, override_config, save_config
from dist_qft.config.methods.door import METHODS, make_method
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError

# A `method` section as checkpoints of earlier versions have it: every key of every method.
SAVED_WHOLE = {
    "name": "qlora",
    "rank": 64,
    "alpha": 16.0,
    "balance": None,
    "pool": None,
    "repeat": None,
    "pool_mode": "mean",
    "dropout": 0.0,
    "merge_aware": False,
    "targets": "all-linear",
    "schedule": [],
    "reduction": None,
    "downsample": None,
    "downsample_rank": None,
    "compat": None,
    "init": None,
    "cache": None,
}
SAVED_RULE = {
    "layers": "mlp",
    "depth": None,
    "rank": 8,
    "alpha": None,
    "balance": None,
    "pool": None,
    "repeat": None,
    "skip": False,
}


@pytest.fixture
def load(tmp_path: Path):
    def loaded(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: a\nmodel: {{path: b}}\n{text}\n")
        return load_config(path, overrides)

    return loaded


def refusal(load, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_section_without_a_name_is_qloras(load):
    assert load("").method == load("method: {}").method == make_method(name="qlora")
    assert load("method: {rank: 8}").method == make_method(name="qlora", rank=8)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_refuses_the_keys_of_the_others(load, name):
    foreign = {key: kind for kind in METHODS.values() for key in kind.own_keys()}
    wrong = {"schedule": "[{skip: true}]", "targets": "mlp", "pool_mode": "sum", "downsample": "lora", "init": "pruned"}
    for key in set(foreign) - set(METHODS[name].own_keys()):
        value = wrong.get(key, {"merge_aware": "true", "use_rslora": "true", "cache": "disk"}.get(key, "2"))
        line = refusal(load, f"method: {{name: {name}, {key}: {value}}}")
        assert f"method.{key}: {name} does not use it; {name} has " in line


@pytest.mark.parametrize("name", METHODS)
def test_a_config_that_an_earlier_version_saved_whole_loads(name, tmp_path):
    saved = {**SAVED_WHOLE, "name": name}
    if issubclass(METHODS[name], TileMethod):
        saved["schedule"] = [SAVED_RULE]
    tree = {"output_dir": "a", "model": {"path": "b"}, "method": saved, "sharding": {"reduction": "invariant"}}
    config = RunConfig.model_validate(tree)
    defaults = make_method(name=name).model_dump()
    assert {**config.method.model_dump(), "schedule": []} == {**defaults, "schedule": []}
    if isinstance(config.method, TileMethod):
        assert config.method.given(config.method.schedule[0]) == {"rank": 8}
    assert config.sharding.gradient_sum == "invariant"
    # Settings of today survive the same way, and one can be overridden.
    again = RunConfig.model_validate(config.model_dump())
    assert again == config
    assert override_config(again, ["train.seed=3"]).method == config.method
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_null_or_a_default_of_another_method_says_nothing(load):
    config = load("method: {name: qalora, pool: null, reduction: null, balance: null}")
    assert config.method == make_method(name="qalora")
    assert load("method: {name: qlora, pool_mode: mean, merge_aware: false}").method == make_method(name="qlora")
    assert "got null" in refusal(load, "method: {rank: null}")


def test_another_method_on_the_command_line_drops_the_keys_of_the_old_one(load):
    text = "method: {name: qlora, rank: 8, alpha: 4, use_rslora: true}"
    config = load(text, "method.name=qst")
    assert config.method == make_method(name="qst")
    (note,) = config_warnings(config)
    assert note.startswith("method.name: qst on the command line, qlora in the file")
    assert note.endswith("dropped from the file: rank, alpha, use_rslora")
    config = load(text, "method.name=qahira", "method.pool=8")
    assert config.method == make_method(name="qahira", rank=8, alpha=4, pool=8)
    (note,) = config_warnings(config)
    assert note.endswith("dropped from the file: use_rslora")
    assert config_warnings(load(text, "method.name=qlora")) == []


def test_rules_of_the_schedule_lose_what_the_new_method_does_not_have(load):
    rules = "[{layers: mlp, balance: 4}, {layers: q_proj, rank: 2, balance: 1}, {layers: k_proj, skip: true}]"
    config = load(f"method: {{name: qbara, schedule: {rules}}}", "method.name=qalora")
    assert isinstance(config.method, TileMethod)
    assert [(rule.layers, rule.rank, rule.skip) for rule in config.method.schedule] == [
        ("q_proj", 2, False),
        ("k_proj", None, True),
    ]
    assert "balance in schedule" in config_warnings(config)[0]


def test_keys_of_the_old_method_on_the_command_line_are_refused(load):
    line = refusal(load, "method: {rank: 8}", "method.name=qst", "method.rank=4")
    assert line.startswith("command line: method.rank=4: qst does not use it")
    line = refusal(load, "method: {rank: 8, rnak: 3}", "method.name=qst")
    assert "unknown key 'method.rnak'" in line, "a misspelt key is not another method's"
    assert "method.name" in refusal(load, "method: {rank: 8}", "method.name=qxt")


def test_a_key_by_its_earlier_name_is_read_with_a_note(load):
    config = load("sharding: {reduction: invariant}")
    assert config.sharding.gradient_sum == "invariant"
    assert config_warnings(config) == ["sharding.reduction: now called sharding.gradient_sum"]
    assert config_warnings(change_config(config, {"train.seed": 1})) == config_warnings(config)
    for override in ("sharding.reduction=invariant", "sharding={reduction: invariant}"):
        assert load("sharding: {gradient_sum: fast}", override).sharding.gradient_sum == "invariant"
    assert load("sharding: {reduction: invariant}", "sharding.gradient_sum=fast").sharding.gradient_sum == "fast"
    line = refusal(load, "sharding:\n  engine: fsdp\n  reduction: slow")
    assert "run.yaml:5: sharding.gradient_sum: got 'slow'" in line
    assert "unknown key 'sharding.reduction'" in refusal(load, "sharding: {reduction: fast, gradient_sum: fast}")
