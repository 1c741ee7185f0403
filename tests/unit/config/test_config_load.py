"""Reading a config: values, overrides, and every fault with its place."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dist_qft.config.load import load_config, save_config
from dist_qft.config.methods.door import METHODS
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError

MINIMAL = "output_dir: runs/a\nmodel: {path: folder}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_config(text: str, minimal: str = MINIMAL) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(minimal + textwrap.dedent(text))
        return path

    return write_config


def faults(path: Path, *overrides: str) -> list[str]:
    """The lines of the refusal, the file's folder taken off."""
    with pytest.raises(UserError) as refusal:
        load_config(path, overrides)
    assert refusal.value.exit_code == 2
    return str(refusal.value).replace(f"{path.parent}/", "").splitlines()


def test_defaults_fill_what_the_file_leaves_out(write):
    config = load_config(write(""))
    assert config == RunConfig(output_dir="runs/a", model={"path": "folder"})
    assert config.train.learning_rate == 2e-4


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1.0E-4", 1e-4), ("2", 2.0), ("0x10", 16.0), ("1_0", 10.0)])
def test_numbers_are_yaml_1_2(write, text, value):
    assert load_config(write(f"train: {{learning_rate: {text}}}")).train.learning_rate == value


def test_words_that_yaml_1_1_takes_for_booleans_are_strings(write):
    config = load_config(write("evaluation: {prompts: [on, yes, n]}"))
    assert config.evaluation.prompts == ["on", "yes", "n"]


def test_anchors_and_merge_keys(write):
    path = write("""\
        data:
          train: &pairs {path: a.jsonl, limit: 5}
          eval: {<<: *pairs, split: test}
        """)
    data = load_config(path).data
    assert (data.eval.path, data.eval.limit, data.eval.split) == ("a.jsonl", 5, "test")


def test_override_does_not_reach_through_an_alias(write):
    path = write("data: {train: &pairs {path: a.jsonl}, eval: *pairs}")
    data = load_config(path, ["data.eval.limit=3"]).data
    assert (data.train.limit, data.eval.limit) == (None, 3)


def test_overrides_apply_in_order_and_take_yaml_values(write):
    path = write("method: {name: qbara, schedule: [{layers: mlp, rank: 8}]}\ntrain: {seed: 1}")
    config = load_config(
        path,
        [
            "train.seed=2",
            "train.seed=3",
            "train.learning-rate=1e-5",
            "method.targets=[q_proj, v_proj]",
            "method.schedule.0.rank=4",
            "quantization={linear: affine4, block: [8, 4]}",
            "data.train.path=a=b.jsonl",
            "train.max_grad_norm=",
        ],
    )
    assert config.train.seed == 3
    assert config.train.learning_rate == 1e-5
    assert config.method.targets == ["q_proj", "v_proj"]
    assert config.method.schedule[0].rank == 4
    assert config.quantization.block == [8, 4]
    assert config.data.train.path == "a=b.jsonl"
    assert config.train.max_grad_norm is None


def test_a_word_for_a_section_can_be_overridden_in_parts(write):
    assert load_config(write("quantization: auto"), ["quantization.linear=affine4"]).quantization.linear == "affine4"


def test_all_faults_at_once_each_with_its_line(write):
    path = write("""\
        train:
          learning_rat: 1e-4
          max_steps: three
          warmup_ratio: .nan
          adam_epsilon: .inf
        learning_rate: 1e-4
        method:
          targets: [1]
          schedule:
            - layers: all
              rnk: 3
              depth: [1]
        quantization:
          block:
            - 1
            - 0
        data:
          train: {limit: -1}
        sharding:
          reshard_after_forward: 1
        checkpoint:
        """)
    assert faults(path, "train.optim=adam", "evaluation={eval_steps: x}") == [
        "command line: train.optim=adam: got 'adam' (str), must be one of adamw, paged_adamw_32bit, paged_adamw_8bit",
        "command line: evaluation={eval_steps: x}: evaluation.eval_steps: got 'x' (str), must be an integer > 0",
        "run.yaml:4: unknown key 'train.learning_rat', did you mean 'train.learning_rate'?",
        "run.yaml:5: train.max_steps: got 'three' (str), must be an integer > 0",
        "run.yaml:6: train.warmup_ratio: got nan (float), must be a number >= 0 and < 1",
        "run.yaml:7: train.adam_epsilon: got inf (float), must be a number > 0",
        "run.yaml:8: unknown key 'learning_rate', did you mean 'train.learning_rate'?",
        "run.yaml:10: method.targets: got [1] (list), must be a string or a list, each item a string",
        "run.yaml:13: unknown key 'method.schedule.0.rnk', did you mean 'method.schedule.0.rank'?",
        "run.yaml:14: method.schedule.0.depth: got [1] (list), must be a list of 2, each item an integer >= 0",
        "run.yaml:18: quantization.block.1: got 0 (int), must be an integer > 0",
        "run.yaml:20: data.train.limit: got -1 (int), must be an integer > 0",
        "run.yaml:20: data.train.path: missing, must be a non-empty string",
        "run.yaml:22: sharding.reshard_after_forward: got 1 (int), must be true or false",
        "run.yaml:23: checkpoint: got null, must be a section with save_steps, save_total_limit, keep_best, "
        "load_best_at_end",
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("lora_r: 8", "unknown key 'lora_r', did you mean 'method.rank'?"),
        ("method: {lora_alpha: 8}", "unknown key 'method.lora_alpha', did you mean 'method.alpha'?"),
        ("train: {rank: 8}", "unknown key 'train.rank', did you mean 'method.rank'?"),
        ("cutoff_len: 8", "unknown key 'cutoff_len', did you mean 'data.max_length'?"),
        ("base_model: x", "unknown key 'base_model', did you mean 'model.path'?"),
        ("micro_batch_size: 8", "unknown key 'micro_batch_size', did you mean 'train.per_device_train_batch_size'?"),
        (
            "train: {gradient_accumulation_steps: 8}",
            "unknown key 'train.gradient_accumulation_steps': it is derived: train.global_batch_size / "
            "(train.per_device_train_batch_size x number of ranks)",
        ),
        ("merge: {zzz: 8}", "unknown key 'merge.zzz', allowed here: at_end, path, dtype, overwrite"),
        ("evaluation: {steps: 8}", "unknown key 'evaluation.steps', did you mean 'evaluation.eval_steps'?"),
        ("evalution: {eval_steps: 8}", "unknown key 'evalution', did you mean 'evaluation'?"),
        ("3: 8", "key 3 is not a string"),
    ],
)
def test_unknown_keys(write, line, message):
    assert faults(write(line)) == [f"run.yaml:3: {message}"]


def test_misspelt_required_section_is_one_fault(write):
    path = write("output_dir: a\nmodl: {path: b}\n", minimal="")
    assert faults(path) == ["run.yaml:2: unknown key 'modl', did you mean 'model'?"]


def test_missing_required_keys_are_named(write):
    assert faults(write("train: {seed: 1}", minimal="")) == [
        "run.yaml: output_dir: missing, must be a non-empty string",
        "run.yaml: model: missing, must be a section with path, revision, attention, attention_from_hub",
    ]


def test_saved_config_loads_as_an_equal_one(write, tmp_path):
    path = write("method: {name: qbara, schedule: [{layers: [q_proj], depth: [0, 3], rank: 8}]}")
    config = load_config(path, ["output_dir='1e3'", "train.adam_epsilon=1e-12", "train.max_grad_norm=null"])
    save_config(config, tmp_path / "saved.yaml")
    saved = load_config(tmp_path / "saved.yaml")
    assert saved == config
    # What was left to its default stays so: a later default or a warning must not see it as given.
    assert saved.train.model_fields_set == {"adam_epsilon", "max_grad_norm"}
    assert saved.model_fields_set == {"output_dir", "model", "method", "train"}


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.seed", "must be key.sub=value"),
        ("train..seed=1", "must be key.sub=value"),
        ("=1", "must be key.sub=value"),
        ("train.seed=[", "the value is not valid YAML; put it in quotes"),
        ("output_dir.sub=1", "'output_dir' is not a section"),
        ("method.schedule.1.rank=2", "'method.schedule' is a list of 1, positions count from 0"),
        ("method.schedule.rank=2", "'method.schedule' is a list of 1, positions count from 0"),
        ("train.seeds=1", "unknown key 'train.seeds', did you mean 'train.seed'?"),
        ("trian.seed=1", "unknown key 'trian', did you mean 'train'?"),
        ("train.seed=-1", "got -1 (int), must be an integer >= 0"),
        ("data.train.limit=5", "data.train.path: missing, must be a non-empty string"),
        ("train.max_steps=true", "got true, must be an integer > 0"),
    ],
)
def test_bad_overrides(write, override, message):
    path = write("method: {name: qlora, schedule: [{rank: 8}]}")
    assert faults(path, override) == [f"command line: {override}: {message}"]


def test_faults_of_overrides_and_file_come_together(write):
    assert faults(write("train: {seed: x}"), "nonsense", "train.logging_steps=0") == [
        "command line: nonsense: must be key.sub=value",
        "command line: train.logging_steps=0: got 0 (int), must be an integer > 0",
        "run.yaml:3: train.seed: got 'x' (str), must be an integer >= 0",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1\nb: 2\n", "run.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("train: {}\nmodel: {}\ntrain: {}\n", 'run.yaml:3: not valid YAML: found duplicate key "train"'),
        ("a:\n\tb: 1\n", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: !!python/object:os.system x\n", "run.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not valid YAML: but found another document"),
        ("a: 1\nb: \x01\n", "run.yaml:2: not valid YAML: special characters are not allowed"),
        ("a: *b\n", "run.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("a: " + "[" * 1500, "run.yaml: not valid YAML: nested too deeply"),
        ("a: 2024-13-01\n", "run.yaml: not valid YAML: month must be in 1..12"),
        ("", "run.yaml: is empty, must be a mapping of settings such as 'output_dir: runs/first'"),
        ("- a\n", "run.yaml: is a list, must be a mapping of settings such as 'output_dir: runs/first'"),
    ],
)
def test_not_a_config(write, text, message):
    (line,) = faults(write(text, minimal=""))
    assert line.startswith(message)


def test_unreadable_files(tmp_path):
    assert faults(tmp_path / "no.yaml") == ["no.yaml: cannot read the config: No such file or directory"]
    (tmp_path / "folder").mkdir()
    assert faults(tmp_path / "folder") == ["folder: cannot read the config: Is a directory"]
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    assert faults(tmp_path / "latin.yaml") == ["latin.yaml:2: not UTF-8 text"]


def test_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).output_dir == "runs/a"


KEYS = st.sampled_from(["output_dir", "model", "train", "train.seed", "method.targets", "method.schedule", "x", "data"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=5,
)


@given(words=st.lists(st.tuples(KEYS, VALUES), max_size=3), text=st.text(max_size=20))
def test_any_input_gives_a_config_or_a_refusal(tmp_path_factory, words, text):
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "run.yaml"
    for content in (MINIMAL, MINIMAL + text):
        path.write_text(content, encoding="utf-8", errors="surrogatepass", newline="")
        try:
            load_config(path, [f"{key}={value}" for key, value in words])
        except UserError as refusal:
            assert str(refusal)


def settings(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings outside lists."""
    names = []
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner and get_origin(field.annotation) not in (list, Sequence):
            names += settings(inner[0], f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


@pytest.mark.parametrize("wrong", ["{a: 1}", ".nan", "-.inf", "[[]]", "!!binary aGk="])
def test_every_setting_refuses_a_wrong_value_and_all_are_reported(write, wrong):
    names = [name for name in settings(RunConfig) if not name.startswith("method.")]
    assert len(names) > 60
    path = write("data: {train: {path: a}, eval: {path: b}}")
    for method, kind in METHODS.items():
        own = [*names, *(name for name in settings(kind, "method.") if name != "method.name")]
        for some in (own[::2], own[1::2]):  # more than a hundred are not told at once
            lines = faults(path, f"method.name={method}", *(f"{name}={wrong}" for name in some))
            assert {line.removeprefix("command line: ").partition("=")[0] for line in lines} == set(some)
    (line,) = faults(path, f"method.name={wrong}")
    assert line.endswith("must be one of " + ", ".join(METHODS))
