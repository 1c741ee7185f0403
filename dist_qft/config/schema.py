"""The config tree: every setting, its type, its default and its allowed range, in one place.

A config file is YAML with these sections; `dist_qft.config.load` reads it, applies `key.sub=value`
overrides and reports all faults at once. After loading nobody asks for a default again: the run uses the values that a
section holds. Names follow Hugging Face's where they have one.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from dist_qft.config.data_schema import DataConfig, TaskConfig
from dist_qft.config.methods.door import AnyMethod
from dist_qft.config.methods.qlora import QloraConfig
from dist_qft.config.paths import ExpandedPath
from dist_qft.config.renamed import with_current_names
from dist_qft.config.section import Megabytes, MegabytesOrNone, NonNegative, Positive, Section
from dist_qft.config.train_schema import TrainConfig

MergeTarget = Literal["gguf", "quantized", "dense", "peft"]
LinearFormat = Literal["auto", "stored", "nf4", "affine4", "dense"]


class ModelConfig(Section):
    """The base: which model, and how its attention is computed."""

    path: ExpandedPath = Field(
        description="Hub id or folder (docs/formats-of-bases.md has the formats), or .gguf file",
        json_schema_extra={"transformers": "model_name_or_path", "axolotl": "base_model"},
    )
    revision: str | None = Field(
        None,
        description="Hub revision: a branch, tag or commit",
        json_schema_extra={"transformers": "revision", "axolotl": "revision_of_model"},
    )
    attention: str = Field(
        "sdpa",
        pattern=r"^[\w./-]+$",
        description="how attention is computed: sdpa, eager, or another name that transformers accepts, such as "
        "flash_attention_2 or flex_attention, which need their packages and CUDA",
        json_schema_extra={"transformers": "attn_implementation", "axolotl": "attn_implementation"},
    )
    attention_from_hub: bool = Field(
        False, description="let attention be code of the Hub (`owner/name`), which transformers downloads and runs"
    )


class QuantizationConfig(Section):
    """The base's formats. `quantization: auto` in a file stands for the defaults."""

    linear: LinearFormat = Field(
        "auto",
        description="format of the decoder's linear layers; auto: as the files hold them if they are quantized, "
        "else nf4; stored: as the files hold them",
        json_schema_extra={"transformers": "bnb_4bit_quant_type"},
    )
    block: Annotated[list[Positive], Field(min_length=1, max_length=2)] | None = Field(
        None, description="weights sharing constants: [64] for nf4, [b_out, b_in] for affine4 (default [1, 32])"
    )
    constants: Literal["float16", "float32"] | None = Field(
        None, description="affine4 only: dtype of the blocks' scales and zeros (default float16)"
    )
    double_quant: bool = Field(
        False,
        description="nf4 only: quantize the block constants to 8 bits as QLoRA does",
        json_schema_extra={"transformers": "bnb_4bit_use_double_quant"},
    )
    embedding: Literal["auto", "stored", "q8_0", "dense"] = Field(
        "auto",
        description="format of embedding and LM head; auto: as the files hold them if they are quantized, else q8_0; "
        "stored: as the files hold them",
    )
    exempt: list[str] = Field(
        [],
        description="linear layers kept dense: last name or full path",
        json_schema_extra={"transformers": "llm_int8_skip_modules"},
    )

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: object) -> object:
        return {} if value == "auto" else value


class ShardingConfig(Section):
    """The division of the frozen base over the ranks, and the work of the ranks together."""

    engine: Literal["fsdp", "zero", "replicated"] = Field(
        "fsdp", description="how the base is held: sharded by FSDP2 or by DeepSpeed ZeRO-3, or whole on every rank"
    )
    group: Literal["auto", "world", "node"] | Positive = Field(
        "world", description="fsdp, zero: ranks that share one base; auto: the fewest whose plan fits the memory"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is a GPU")
    reshard_after_forward: bool = Field(
        True,
        description="fsdp: free a layer after its forward pass and gather it again for backward",
        json_schema_extra={"axolotl": "fsdp_config.reshard_after_forward"},
    )
    prefetch_megabytes: MegabytesOrNone = Field(
        0.0, description="zero: MB of the base that may be gathered ahead of their use"
    )
    offload: bool = Field(False, description="zero, CUDA: keep each rank's part of the base in host memory")
    deepspeed_config: ExpandedPath | None = Field(
        None,
        description="zero: a DeepSpeed JSON file, merged into our settings",
        json_schema_extra={"transformers": "deepspeed", "axolotl": "deepspeed"},
    )
    gradient_sum: Literal["fast", "invariant"] = Field(
        "fast",
        description="order in which gradients are added. fast: bucketed all-reduce during backward; invariant: a fixed "
        "order that gives the same bits on any number of ranks",
    )
    bucket_megabytes: Megabytes = Field(
        25.0,
        description="fast: MB of a bucket of the gradients' all-reduce",
        json_schema_extra={"transformers": "ddp_bucket_cap_mb", "axolotl": "ddp_bucket_cap_mb"},
    )
    digest_steps: NonNegative = Field(
        10, description="compare digests of the ranks' trainables every so many steps; 0 for never"
    )
    timeout_seconds: Positive = Field(
        600,
        description="seconds after which a collective that has not ended ends the run",
        json_schema_extra={"transformers": "ddp_timeout", "axolotl": "ddp_timeout"},
    )
    rank0_timeout_seconds: Positive = Field(
        3600, description="seconds that the other ranks wait for work of rank 0 alone, such as saving or merging"
    )


class CheckpointConfig(Section):
    """Checkpoints: when they are written and which are kept."""

    save_steps: Positive | None = Field(
        None,
        description="save every so many steps; default: at the end only",
        json_schema_extra={"transformers": "save_steps", "axolotl": "save_steps"},
    )
    save_total_limit: Annotated[int, Field(ge=2)] = Field(
        2,
        description="checkpoints that are kept, the newest ones",
        json_schema_extra={"transformers": "save_total_limit", "axolotl": "save_total_limit"},
    )
    keep_best: bool = Field(False, description="save at, and never prune, the best evaluation (evaluation.metric)")
    load_best_at_end: bool = Field(
        False,
        description="the run's result, which is measured, answers and is merged at the end, is that of the best "
        "evaluation and not of the last step",
        json_schema_extra={"transformers": "load_best_model_at_end", "axolotl": "load_best_model_at_end"},
    )


class EvaluationConfig(Section):
    """Evaluations: when held-out data are evaluated, and prompts to answer then."""

    eval_steps: Positive | None = Field(
        None,
        description="evaluate every so many steps; default: before and after training only",
        json_schema_extra={"transformers": "eval_steps", "axolotl": "eval_steps"},
    )
    prompts: list[str] = Field([], description="answered before and after training, and at each evaluation")
    max_new_tokens: Positive = Field(
        64,
        description="tokens of an answer at most",
        json_schema_extra={"transformers": "max_new_tokens", "axolotl": "eval_max_new_tokens"},
    )
    metric: Literal["loss", "accuracy", "matthews", "f1", "pearson", "rewards/accuracies", "rewards/margins"] = Field(
        "loss",
        description="figure that tells the best evaluation: loss, or one of the task's, of which more is better",
        json_schema_extra={"transformers": "metric_for_best_model", "axolotl": "metric_for_best_model"},
    )
    early_stopping_patience: Positive | None = Field(
        None,
        description="end the run after so many evaluations in a row without a better one",
        json_schema_extra={"transformers": "early_stopping_patience", "axolotl": "early_stopping_patience"},
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="a better evaluation is better by more than this",
        json_schema_extra={"transformers": "early_stopping_threshold"},
    )


class MergeConfig(Section):
    """The merge that ends a run, if any; `dist-qft merge` does it later."""

    at_end: MergeTarget | None = Field(None, description="merge the trained adapters into a result of this kind")
    path: ExpandedPath | None = Field(
        None, description="file or folder of the result; default <output_dir>/merged.gguf or merged-<kind>"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dense only: dtype of the weights")
    overwrite: bool = Field(False, description="replace the result of a merge that is at the path")


class RunConfig(Section):
    """The whole tree."""

    output_dir: ExpandedPath = Field(
        description="folder of the run: checkpoints, logs, summary",
        json_schema_extra={"transformers": "output_dir", "axolotl": "output_dir"},
    )
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
        """Notes for the user on changes made while reading: keys with old names, keys that were dropped."""
        return self._notes

    def with_notes(self, notes: Iterable[str]) -> "RunConfig":
        """A copy that carries these notes."""
        copy = self.model_copy()
        copy._notes = tuple(notes)
        return copy
