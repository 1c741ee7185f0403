"""The section `train`: the length of training, its batches, and the optimizer."""

from typing import Annotated, Literal

from pydantic import Field

from dist_qft.config.section import Fraction, Megabytes, NonNegative, Positive, PositiveNumber, Section, Seed, Text

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class LrGroup(Section):
    """Trainables with a learning rate of their own."""

    name: Text | None = Field(None, description="for people alone")
    modules: Annotated[list[Text], Field(min_length=1)] = Field(
        description="parts of names of trainables, such as `self_attn.q_proj` or `layers.0.`; one is enough"
    )
    lr: PositiveNumber = Field(description="peak learning rate; the schedule is that of train.learning_rate")


class TrainConfig(Section):
    """The length of training, its batches, and the optimizer."""

    max_steps: Positive | None = Field(
        None,
        description="optimizer steps; wins over num_train_epochs",
        json_schema_extra={"transformers": "max_steps", "axolotl": "max_steps"},
    )
    num_train_epochs: PositiveNumber = Field(
        1.0,
        description="passes over the training data; may be a fraction",
        json_schema_extra={"transformers": "num_train_epochs", "axolotl": "num_epochs"},
    )
    global_batch_size: Positive = Field(
        16,
        description="rows per optimizer step, over all ranks; a row is a sample, or with data.packing several samples",
    )
    per_device_train_batch_size: Positive = Field(
        1,
        description="rows per micro-batch of one rank",
        json_schema_extra={"transformers": "per_device_train_batch_size", "axolotl": "micro_batch_size"},
    )
    learning_rate: PositiveNumber = Field(
        2e-4,
        description="peak learning rate; mean pooling in a tile method needs a higher one",
        json_schema_extra={"transformers": "learning_rate", "axolotl": "learning_rate"},
    )
    loraplus_lr_ratio: PositiveNumber | None = Field(
        None,
        description="LoRA+: learning rate of every adapter's B over that of A; for methods that have both",
        json_schema_extra={"peft": "loraplus_lr_ratio", "axolotl": "loraplus_lr_ratio"},
    )
    lr_groups: list[LrGroup] = Field(
        [],
        description="trainables with learning rates of their own; of several groups that name one, the first counts",
        json_schema_extra={"axolotl": "lr_groups"},
    )
    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "warmup_stable_decay"
    ] = Field(
        "constant",
        description="course of the rate after the warm-up, which the constant ones have as well",
        json_schema_extra={"transformers": "lr_scheduler_type", "axolotl": "lr_scheduler"},
    )
    min_lr_ratio: Fraction = Field(
        0.0,
        description="share of learning_rate that a decaying schedule ends at",
        json_schema_extra={"transformers": "min_lr_rate", "axolotl": "cosine_min_lr_ratio"},
    )
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="warmup_stable_decay: share of the steps, at the end, in which the rate falls"
    )
    warmup_ratio: Fraction = Field(
        0.03,
        description="share of the steps over which the rate rises from 0, also with constant; 0 for no warm-up",
        json_schema_extra={"transformers": "warmup_ratio", "axolotl": "warmup_ratio"},
    )
    warmup_steps: NonNegative | None = Field(
        None,
        description="steps of the warm-up; wins over warmup_ratio",
        json_schema_extra={"transformers": "warmup_steps", "axolotl": "warmup_steps"},
    )
    optim: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="optimizer; the paged ones are of bitsandbytes and need CUDA",
        json_schema_extra={"transformers": "optim", "axolotl": "optimizer"},
    )
    shard_optimizer: bool | None = Field(
        None,
        description="keep 1/N of the optimizer's state on each of N ranks (ZeRO stage 1); default: from 64 million "
        "trainables on",
    )
    adam_beta1: Fraction = Field(
        0.9,
        description="decay of AdamW's mean of gradients",
        json_schema_extra={"transformers": "adam_beta1", "axolotl": "adam_beta1"},
    )
    adam_beta2: Fraction = Field(
        0.999,
        description="decay of AdamW's mean of squared gradients",
        json_schema_extra={"transformers": "adam_beta2", "axolotl": "adam_beta2"},
    )
    adam_epsilon: PositiveNumber = Field(
        1e-8,
        description="added to the root in AdamW's denominator",
        json_schema_extra={"transformers": "adam_epsilon", "axolotl": "adam_epsilon"},
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="AdamW's decoupled weight decay of matrices; norms, biases and other vectors have none",
        json_schema_extra={"transformers": "weight_decay", "axolotl": "weight_decay"},
    )
    max_grad_norm: PositiveNumber | None = Field(
        0.3,
        description="clip the norm of all gradients to this; null for no clipping",
        json_schema_extra={"transformers": "max_grad_norm", "axolotl": "max_grad_norm"},
    )
    gradient_checkpointing: bool = Field(
        False,
        description="keep one activation per decoder layer and compute the others again in backward",
        json_schema_extra={"transformers": "gradient_checkpointing", "axolotl": "gradient_checkpointing"},
    )
    checkpoint_every_n_layers: Positive = Field(
        1,
        description="gradient_checkpointing: only every n-th decoder layer, which takes more memory and less computing",
    )
    offload_activations: bool = Field(
        False,
        description="gradient_checkpointing, CUDA: keep the activations in host memory",
        json_schema_extra={"axolotl": "activation_offloading"},
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="compute dtype; auto: bfloat16 on CUDA and CPUs that multiply it natively (AMX, AVX512-BF16), else"
        " float32. Trainables are always float32",
        json_schema_extra={"transformers": "bf16", "axolotl": "bf16"},
    )
    loss_chunk_megabytes: Megabytes | None = Field(
        None,
        description="MB of logits held at a time; default 64 on CUDA, 8 on a CPU (fits the cache)",
    )
    seed: Seed = Field(
        0,
        description="seed of initial values, dropout and the order of samples",
        json_schema_extra={"transformers": "seed", "axolotl": "seed"},
    )
    report_to: Tracker | Literal["none", "all"] | list[Tracker] = Field(
        "tensorboard",
        description="where figures go besides metrics.jsonl; all: TensorBoard and every tracker that is installed",
        json_schema_extra={"transformers": "report_to"},
    )
    logging_steps: Positive = Field(
        1,
        description="write figures every so many steps",
        json_schema_extra={"transformers": "logging_steps", "axolotl": "logging_steps"},
    )
