"""The config tree: every setting, its type, its default and its allowed range, in one place.

A config file is YAML with these sections; `dist_qft.config.load` reads it, applies `key.sub=value`
overrides and reports all faults at once. After loading nobody asks for a default again: what a section
holds is what the run uses. Names follow Hugging Face's where they have one.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from dist_qft.config.methods.door import AnyMethod
from dist_qft.config.methods.qlora import QloraConfig
from dist_qft.config.renamed import with_current_names
from dist_qft.config.section import Fraction, NonNegative, Positive, Section, Text

MergeTarget = Literal["gguf", "quantized", "dense", "peft"]
LinearFormat = Literal["auto", "stored", "nf4", "affine4", "dense"]


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
    gradient_sum: Literal["fast", "invariant"] = Field(
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
    method: AnyMethod = QloraConfig(name="qlora")
    task: TaskConfig = TaskConfig()
    data: DataConfig | None = Field(None, description="needed by train and eval")
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    merge: MergeConfig = MergeConfig()

    @model_validator(mode="before")
    @classmethod
    def _keys_by_their_present_names(cls, values: object) -> object:
        return with_current_names(values)

    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """What reading this config changed, for its user to know: keys with old names, keys that were dropped."""
        return self._notes

    def with_notes(self, notes: Iterable[str]) -> "RunConfig":
        """A copy that carries these notes."""
        copy = self.model_copy()
        copy._notes = tuple(notes)
        return copy
