"""The config tree: every setting, its type, its default and its allowed range, in one place.

A config file is YAML with these sections; `dist_qft.config.load` reads it, applies `key.sub=value`
overrides and reports all faults at once. After loading nobody asks for a default again: what a section
holds is what the run uses. Names follow Hugging Face's where they have one.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]

Reduction = Annotated[int, Field(ge=2)]

MethodName = Literal["qlora", "qbara", "qalora", "qahira", "qst"]
MergeTarget = Literal["gguf", "quantized", "dense", "peft"]
Downsample = Literal["adapter", "lora", "linear", "maxpool", "avgpool"]
LinearFormat = Literal["auto", "stored", "nf4", "affine4", "dense"]


class Section(BaseModel):
    """A part of the config: unknown keys, silent type conversions, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: Text = Field(description="Hub id or folder (docs/formats-of-bases.md has the formats), or .gguf file")
    revision: str | None = Field(None, description="Hub revision")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


class QuantizationConfig(Section):
    """The base's formats. `quantization: auto` in a file stands for the defaults."""

    linear: LinearFormat = Field(
        "auto",
        description="format of the decoder's linear layers; auto: as the files hold them if they are quantized, "
        "else nf4; stored: as the files hold them",
    )
    block: Annotated[list[Positive], Field(min_length=1, max_length=2)] | None = Field(
        None, description="weights sharing constants: [64] for nf4, [b_out, b_in] for affine4 (default [1, 32])"
    )
    constants: Literal["float16", "float32"] | None = Field(
        None, description="affine4 only: dtype of the blocks' scales and zeros (default float16)"
    )
    double_quant: bool = Field(False, description="nf4 only: quantize the block constants to 8 bits as QLoRA does")
    embedding: Literal["auto", "stored", "q8_0", "dense"] = Field(
        "auto",
        description="format of embedding and LM head; auto: as the files hold them if they are quantized, else q8_0; "
        "stored: as the files hold them",
    )
    exempt: list[str] = Field([], description="linear layers kept dense: last name or full path")

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: object) -> object:
        return {} if value == "auto" else value


class ScheduleRule(Section):
    """Overrides for some layers; later rules win. At least one setting besides the selection."""

    layers: str | list[str] = Field("all", description="layer types (q_proj, ...), 'attention', 'mlp' or 'all'")
    depth: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] | None = Field(
        None, description="first and last decoder layer, both included"
    )
    rank: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    balance: Positive | None = None
    pool: Positive | None = None
    repeat: Positive | None = None
    skip: bool = Field(False, description="attach nothing to these layers")


class MethodConfig(Section):
    name: MethodName = "qlora"
    rank: Positive = 64
    alpha: Annotated[float, Field(gt=0)] = 16.0
    balance: Positive | None = Field(None, description="qbara's balancing factor lambda (default 2)")
    pool: Positive | None = Field(None, description="inputs averaged: qalora (default 32), qahira (default 4)")
    repeat: Positive | None = Field(None, description="copies of each output: qahira (default 8)")
    pool_mode: Literal["mean", "sum"] = "mean"
    dropout: Fraction = 0.0
    merge_aware: bool = Field(False, description="qalora, qahira: train with zeros as the exact merge will write them")
    targets: str | list[str] = Field("all-linear", description="'all-linear', or layer types as in a schedule")
    schedule: list[ScheduleRule] = []
    reduction: Reduction | None = Field(None, description="qst: times that the side network is narrower (default 16)")
    downsample: Downsample | None = Field(None, description="qst: how hidden states get narrow (default adapter)")
    downsample_rank: Positive | None = Field(None, description="qst: rank of adapter or lora (default 16)")
    compat: Literal["paper", "released"] | None = Field(None, description="qst: paper (default) or the released code")
    init: Literal["random", "pruned"] | None = Field(None, description="qst: pruned starts from the base's own weights")
    cache: Literal["none", "disk"] | None = Field(None, description="qst: disk keeps the base's hidden states")


class TaskConfig(Section):
    name: Literal["causal-lm", "classification", "regression"] = Field(
        "causal-lm", description="predict tokens, or from a text's last token a label or a number"
    )
    labels: list[Text] = Field([], description="classification: every label; data may give a name or a position")


class DatasetConfig(Section):
    path: Text = Field(description="Hub id, local file or folder, or 'stdlib-docs'")
    name: str | None = Field(None, description="Hub configuration name")
    split: str = "train"
    format: Literal[
        "auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text", "tokenized", "classification"
    ] = "auto"
    columns: dict[str, str] = Field({}, description="our field name -> the data's column name")
    limit: Positive | None = Field(None, description="use only the first so many samples")


class DataConfig(Section):
    train: DatasetConfig
    eval: DatasetConfig | None = None
    eval_samples: NonNegative = Field(0, description="without eval: hold out so many training samples")
    max_length: Annotated[int, Field(ge=8)] = 512
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    packing: bool = False
    loss_on: Literal["assistant", "all"] = "assistant"
    train_on: Literal["all-turns", "last-turn"] = Field(
        "all-turns", description="the assistant's turns that are predicted: all, or what follows the last question"
    )
    on_missing: Literal["error", "warn"] = Field(
        "error", description="where the chat template leaves out what was said, such as reasoning: refuse, or warn"
    )
    cache_dir: str | None = Field(None, description="tokenized data; default <output_dir>/data_cache")


class TrainConfig(Section):
    max_steps: Positive | None = Field(None, description="optimizer steps; wins over num_train_epochs")
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    global_batch_size: Positive = Field(
        16,
        description="rows per optimizer step, over all ranks; a row is a sample, or with data.packing several samples",
    )
    per_device_train_batch_size: Positive = Field(1, description="rows per micro-batch")
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: Fraction = 0.03
    warmup_steps: NonNegative | None = Field(None, description="wins over warmup_ratio")
    optim: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 0.3
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, else float32"
    )
    loss_chunk_megabytes: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="logits that exist at one time; default 64 on CUDA, 8 on a CPU: what its cache holds is faster",
    )
    seed: NonNegative = 0
    logging_steps: Positive = 1


class ShardingConfig(Section):
    engine: Literal["fsdp", "zero", "replicated"] = "fsdp"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    reshard_after_forward: bool = Field(True, description="fsdp: free a layer after its forward pass")
    prefetch_megabytes: Annotated[float, Field(ge=0)] = Field(
        0.0, description="zero: how much of the base may be gathered ahead of its use"
    )
    offload: bool = Field(False, description="zero, CUDA: keep each rank's part of the base in host memory")
    deepspeed_config: Text | None = Field(None, description="zero: a DeepSpeed JSON file, merged into what we set")
    reduction: Literal["fast", "invariant"] = Field(
        "fast", description="of gradients; invariant: in an order that gives the same bits on any number of ranks"
    )
    bucket_megabytes: Annotated[float, Field(gt=0)] = Field(25.0, description="fast: gradient all-reduce bucket")
    digest_steps: NonNegative = Field(10, description="compare the replicas' digests every so many steps; 0 is never")
    timeout_seconds: Positive = Field(600, description="a collective that takes longer ends the run")
    rank0_timeout_seconds: Positive = Field(
        3600, description="what rank 0 does alone, such as saving, may keep the others waiting so long"
    )


class CheckpointConfig(Section):
    save_steps: Positive | None = Field(None, description="default: at the end only")
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    keep_best: bool = Field(False, description="save at, and never prune, the evaluation with the lowest loss")


class EvaluationConfig(Section):
    eval_steps: Positive | None = Field(None, description="default: before and after training only")
    prompts: list[str] = Field([], description="answered before and after training, and at each evaluation")
    max_new_tokens: Positive = 64


class MergeConfig(Section):
    at_end: MergeTarget | None = Field(None, description="merge the trained adapters into a result of this kind")
    path: Text | None = Field(None, description="its file or folder; default <output_dir>/merged.gguf or merged-<kind>")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dense only: dtype of the weights")
    overwrite: bool = Field(False, description="replace what is at the path")


class RunConfig(Section):
    """The whole tree."""

    output_dir: Text
    model: ModelConfig
    quantization: QuantizationConfig = QuantizationConfig()
    method: MethodConfig = MethodConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig | None = Field(None, description="needed by train and eval")
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    merge: MergeConfig = MergeConfig()
