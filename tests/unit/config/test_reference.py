"""The page of every config key, and the JSON schema that editors read."""

import json
from pathlib import Path

from dist_qft.config.reference import config_page, config_schema, undescribed

PAGE = Path(__file__).resolve().parents[3] / "docs/config.md"


def test_the_page_of_config_keys_is_current():
    assert PAGE.read_text() == config_page(), "run: python -m dist_qft.config.reference >docs/config.md"


# Keys that nobody has described yet: these may only become fewer.
UNDESCRIBED = {
    "RunConfig.output_dir",
    "CheckpointConfig.save_total_limit",
    "DataConfig.max_length",
    "DataConfig.overlong",
    "DataConfig.packing",
    "DataConfig.loss_on",
    "DatasetConfig.split",
    "DatasetConfig.format",
    "EvaluationConfig.max_new_tokens",
    "MethodConfig.name",
    "MethodConfig.rank",
    "MethodConfig.alpha",
    "MethodConfig.pool_mode",
    "MethodConfig.dropout",
    "ModelConfig.attention",
    "ScheduleRule.rank",
    "ScheduleRule.alpha",
    "ScheduleRule.balance",
    "ScheduleRule.pool",
    "ScheduleRule.repeat",
    "ShardingConfig.engine",
    "ShardingConfig.device",
    "TrainConfig.num_train_epochs",
    "TrainConfig.learning_rate",
    "TrainConfig.lr_scheduler_type",
    "TrainConfig.warmup_ratio",
    "TrainConfig.optim",
    "TrainConfig.adam_beta1",
    "TrainConfig.adam_beta2",
    "TrainConfig.adam_epsilon",
    "TrainConfig.weight_decay",
    "TrainConfig.max_grad_norm",
    "TrainConfig.gradient_checkpointing",
    "TrainConfig.seed",
    "TrainConfig.logging_steps",
}


def test_every_config_key_is_described():
    assert set(undescribed(config_schema())) <= UNDESCRIBED, "give the new key a description in its Field"


def test_the_command_prints_the_schema(shell):
    code, out, err = shell("config-schema")
    assert (code, json.loads(out), err) == (0, config_schema(), "")
