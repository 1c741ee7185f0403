"""A user's DeepSpeed JSON: what is taken from it, and each key that cannot be."""

import json

import pytest

from dist_qft.config.deepspeed_file import read_zero_options
from dist_qft.config.load import load_config
from dist_qft.errors import UserError
from dist_qft.ranks.device import CPU_PRECISION
from dist_qft.sharding.engines import engine_warnings


@pytest.fixture
def load(tmp_path):
    """A function from the JSON's content and overrides to the loaded config."""

    def load_with(content, *overrides):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        run = tmp_path / "run.yaml"
        run.write_text(
            f"output_dir: out\nmodel: {{path: m}}\nsharding: {{engine: zero, device: cpu, deepspeed_config: {path}}}\n"
        )
        return load_config(run, overrides)

    return load_with


def test_a_file_as_the_trainer_wants_it_is_accepted(load):
    content = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.3,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "offload_param": {"device": "none", "pin_memory": False},
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": 0,
        },
    }
    config = load(content, "train.per_device_train_batch_size=2")
    assert read_zero_options(config) == {"overlap_comm": True, "offload_param": {"pin_memory": False}}


@pytest.mark.parametrize(
    ("device", "precision", "enabled"),
    [("cuda", "auto", True), ("cuda", "float32", False), ("cpu", "auto", False), ("cpu", "bfloat16", True)],
)
def test_auto_is_the_dtype_that_the_device_computes_in(load, monkeypatch, device, precision, enabled):
    monkeypatch.setenv(CPU_PRECISION, "float32")
    words = (f"sharding.device={device}", f"train.precision={precision}")
    load({"bf16": {"enabled": enabled}}, *words)
    with pytest.raises(UserError, match=f"train.precision means {str(enabled).lower()}; they must agree"):
        load({"bf16": {"enabled": not enabled}}, *words)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_of_another_editor_is_read_as_it_is_checked(load, tmp_path, encoding):
    config = load({})
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}), encoding=encoding)
    assert read_zero_options(config) == {"overlap_comm": True}


def test_without_a_file_there_are_no_options(load):
    config = load({}, "sharding.deepspeed_config=null")
    assert read_zero_options(config) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "has zero_optimization.stage 2, sharding.engine means 3; they must agree",
        ),
        ({"train_batch_size": 8}, "has train_batch_size 8, train.global_batch_size means 16; they must agree"),
        ({"bf16": {"enabled": True}}, "has bf16.enabled true, train.precision means false; they must agree"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            'has zero_optimization.offload_param.device "cpu", sharding.offload means "none"; they must agree',
        ),
        (
            {"zero_optimization": {"stage3_param_persistence_threshold": 1e5}},
            "has zero_optimization.stage3_param_persistence_threshold 100000.0, sharding.engine means 0; they must",
        ),
        ({"zero_optimization": {"stage": True}}, "has zero_optimization.stage true, sharding.engine means 3"),
        ({"optimizer": {"type": "AdamW"}}, "has optimizer.type, which train.optim decides; remove it there"),
        ({"gradient_accumulation_steps": 4}, "which train.global_batch_size decides"),
        ({"zero_optimization": {"reduce_bucket_size": 5}}, "has no effect on a frozen base; remove it. Used: zero_opt"),
        (
            {"zero_optimization": {"overlap_comm": "yes"}},
            'has zero_optimization.overlap_comm "yes", must be true or false',
        ),
        ("[1]", "is not a JSON object: its top is not an object"),
        ("{", "is not a JSON object: "),
    ],
)
def test_what_contradicts_or_would_be_ignored_is_refused_naming_both_keys(load, content, message):
    with pytest.raises(UserError) as raised:
        load(content)
    assert "sharding.deepspeed_config: " in str(raised.value)
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


def test_all_faults_are_told_at_once(load):
    with pytest.raises(UserError) as raised:
        load({"train_batch_size": 8, "zero_optimization": {"stage": 1}})
    assert "train_batch_size 8" in str(raised.value)
    assert "zero_optimization.stage 1" in str(raised.value)


def test_a_missing_file_is_named(load):
    with pytest.raises(UserError, match=r"cannot read '/no/ds\.json': No such file or directory"):
        load({}, "sharding.deepspeed_config=/no/ds.json")


def test_offload_on_a_cpu_is_refused(load):
    with pytest.raises(UserError, match=r"sharding\.offload.*: on a CPU the base is in host memory already; remove it"):
        load({}, "sharding.offload=true", "sharding.device=cpu")


def test_settings_of_another_engine_are_warned_of(load):
    config = load({}, "sharding.engine=fsdp", "sharding.prefetch_megabytes=8")
    warnings = engine_warnings(config)
    assert "sharding.prefetch_megabytes: no effect with engine fsdp" in warnings
    assert "sharding.deepspeed_config: no effect with engine fsdp" in warnings
