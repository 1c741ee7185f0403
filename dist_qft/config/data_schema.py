"""The sections `task` and `data`: what is predicted, and from which text."""

from typing import Annotated, Literal

from pydantic import Field

from dist_qft.config.section import NonNegative, Positive, Section, Text


class TaskConfig(Section):
    """The kind of answer that is trained."""

    name: Literal["causal-lm", "classification", "regression"] = Field(
        "causal-lm", description="predict tokens, or from a text's last token a label or a number"
    )
    labels: list[Text] = Field([], description="classification: every label; data may give a name or a position")


class DatasetConfig(Section):
    """A data set: where it lies and what its columns mean."""

    path: Text = Field(
        description="Hub id, local file or folder, or 'stdlib-docs': questions on this Python's own library",
        json_schema_extra={"axolotl": "path"},
    )
    name: str | None = Field(None, description="Hub configuration name", json_schema_extra={"axolotl": "name"})
    split: str = Field("train", description="split of a Hub data set or folder", json_schema_extra={"axolotl": "split"})
    format: Literal[
        "auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text", "tokenized", "classification"
    ] = Field(
        "auto",
        description="form of a sample; auto goes by the first sample's columns",
        json_schema_extra={"axolotl": "type"},
    )
    columns: dict[str, str] = Field({}, description="our field name -> the data's column name")
    limit: Positive | None = Field(None, description="use only the first so many samples")


class DataConfig(Section):
    """The text that is trained on and the text that is held out, and how both become rows of tokens."""

    train: DatasetConfig = Field(description="the data that is trained on", json_schema_extra={"axolotl": "datasets"})
    eval: DatasetConfig | None = Field(
        None, description="held-out data", json_schema_extra={"axolotl": "test_datasets"}
    )
    eval_samples: NonNegative = Field(
        0, description="without eval: hold out so many training samples", json_schema_extra={"axolotl": "val_set_size"}
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        512,
        description="tokens of a row at most",
        json_schema_extra={"axolotl": "sequence_len"},
    )
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="what happens to samples longer than max_length; what is cut or dropped is counted",
        json_schema_extra={"axolotl": "excess_length_strategy"},
    )
    packing: bool = Field(
        False,
        description="several samples per row, without attention from one to another",
        json_schema_extra={"axolotl": "sample_packing"},
    )
    loss_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="tokens that are predicted: the assistant's, or all",
        json_schema_extra={"axolotl": "train_on_inputs"},
    )
    train_on: Literal["all-turns", "last-turn"] = Field(
        "all-turns", description="the assistant's turns that are predicted: all, or what follows the last question"
    )
    on_missing: Literal["error", "warn"] = Field(
        "error", description="where the chat template leaves out what was said, such as reasoning: refuse, or warn"
    )
    cache_dir: str | None = Field(
        None,
        description="folder of tokenized data; default <output_dir>/data_cache",
        json_schema_extra={"axolotl": "dataset_prepared_path"},
    )
