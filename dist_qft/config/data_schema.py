"""The sections `task` and `data`: the targets of predictions, and the text that they are made from."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from dist_qft.config.paths import ExpandedPath
from dist_qft.config.section import UNION_TAGS, NonNegative, Positive, PositiveNumber, Section, Text


def _as_text(date: Any) -> Any:
    """A date as it is written: YAML makes an object of one without quotes."""
    return date.isoformat() if type(date) is datetime.date else date


PREFERENCE_TASKS = ("dpo", "orpo", "kto")
REFERENCE_TASKS = ("dpo", "kto")  # those that compare with a reference, which is the base
# The formats of tasks that have their own; other data, too, may have such fields, so these are never guessed.
TASK_FORMATS: dict[str, tuple[str, ...]] = {
    "classification": ("classification",),
    "regression": ("classification",),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("unpaired-preference", "preference"),
}
OF_TASKS = frozenset(format for formats in TASK_FORMATS.values() for format in formats)
# The forms of a data set's rows: tokens to predict, a label, a pair of answers (of which the prompt may be trained on,
# too), or an answer with a verdict (which a measure of drift, KL, may need to see beside other prompts).
RowKind = Literal["tokens", "labels", "pairs", "pairs-with-prompts", "rated", "rated-with-kl"]
DPOLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]
KTOLoss = Literal["kto", "apo_zero_unpaired"]
PreferenceLoss = Literal[DPOLoss, KTOLoss]


class TaskConfig(Section):
    """The kind of answer that is trained."""

    name: Literal["causal-lm", "classification", "regression", "dpo", "orpo", "kto"] = Field(
        "causal-lm",
        description="predict tokens, or from a text's last token a label or a number; dpo, orpo, kto: prefer answers "
        "to others (docs/preference.md)",
        json_schema_extra={"axolotl": "rl"},
    )
    labels: list[Text] = Field([], description="classification: every label; data may give a name or a position")
    beta: PositiveNumber = Field(
        0.1,
        description="dpo, kto: the higher, the closer the model stays to the base; orpo: weight of the odds ratio",
        json_schema_extra={"trl": "beta", "axolotl": "rl_beta"},
    )
    loss_type: PreferenceLoss | None = Field(
        None,
        description="dpo: sigmoid (default) or another loss of TRL on one pair; kto: kto (default) or "
        "apo_zero_unpaired",
        json_schema_extra={"trl": "loss_type", "axolotl": "dpo_loss_type"},
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0,
        description="dpo with loss_type robust or exo_pair: share of pairs whose order is wrong",
        json_schema_extra={"trl": "label_smoothing", "axolotl": "dpo_label_smoothing"},
    )
    desirable_weight: PositiveNumber = Field(
        1.0,
        description="kto: weight of answers that are wanted",
        json_schema_extra={"trl": "desirable_weight", "axolotl": "kto_desirable_weight"},
    )
    undesirable_weight: PositiveNumber = Field(
        1.0,
        description="kto: weight of answers that are not wanted",
        json_schema_extra={"trl": "undesirable_weight", "axolotl": "kto_undesirable_weight"},
    )

    @property
    def predicts_labels(self) -> bool:
        """True if the model gets a head of its own, and answers with labels or numbers."""
        return self.name in ("classification", "regression")

    @property
    def prefers(self) -> bool:
        """True if answers are compared with others or with a verdict."""
        return self.name in PREFERENCE_TASKS

    @property
    def has_reference(self) -> bool:
        """True if the tuned model's answers are compared with the base's."""
        return self.name in REFERENCE_TASKS

    @property
    def loss_unit(self) -> str:
        """The unit of training and held-out losses, for their readers."""
        units = {"classification": "nats per text", "regression": "squared error", "kto": "KTO loss per answer"}
        if self.name in PREFERENCE_TASKS:
            return units.get(self.name, f"{self.name.upper()} loss per pair")
        return units.get(self.name, "nats per target")

    @property
    def loss(self) -> str:
        """The loss of a task that prefers answers, where `loss_type` may leave it open."""
        return self.loss_type or {"dpo": "sigmoid", "kto": "kto"}.get(self.name, "")

    @property
    def rows(self) -> RowKind:
        """The form of the data's rows."""
        if self.predicts_labels:
            return "labels"
        if self.name == "kto":
            return "rated-with-kl" if self.loss == "kto" else "rated"
        if self.prefers:
            return "pairs" if self.name == "dpo" else "pairs-with-prompts"
        return "tokens"


class DatasetConfig(Section):
    """A data set: its place and the meaning of its columns."""

    path: ExpandedPath = Field(
        description="Hub id, local file, folder or pattern, or 'stdlib-docs': questions on this Python's own library",
        json_schema_extra={"axolotl": "path"},
    )
    name: str | None = Field(None, description="Hub configuration name", json_schema_extra={"axolotl": "name"})
    split: str = Field("train", description="split of a Hub data set or folder", json_schema_extra={"axolotl": "split"})
    format: Literal[
        "auto",
        "alpaca",
        "sharegpt",
        "messages",
        "prompt-completion",
        "text",
        "tokenized",
        "classification",
        "preference",
        "unpaired-preference",
    ] = Field(
        "auto",
        description="form of a sample; auto goes by the first sample's columns",
        json_schema_extra={"axolotl": "type"},
    )
    columns: dict[str, str] = Field({}, description="our field name -> the data's column name")
    limit: Positive | None = Field(None, description="use only the first so many samples")
    weight: PositiveNumber | None = Field(
        None, description="of several in data.train: its share of the rows drawn; none of them: all rows in one order"
    )


def _number(value: object) -> str:
    return UNION_TAGS[isinstance(value, list)]


DataSets = Annotated[
    Annotated[DatasetConfig, Tag(UNION_TAGS[0])]
    | Annotated[list[DatasetConfig], Field(min_length=1), Tag(UNION_TAGS[1])],
    Discriminator(_number),
]


class DataConfig(Section):
    """The text that is trained on and the text that is held out, and how both become rows of tokens."""

    train: DataSets = Field(
        description="the data that is trained on: one data set, or a list of them",
        json_schema_extra={"axolotl": "datasets"},
    )
    eval: DataSets | None = Field(
        None,
        description="held-out data: one data set, or a list of them, of which every row is used",
        json_schema_extra={"axolotl": "test_datasets"},
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
    template: Literal["chat", "alpaca", "none"] = Field(
        "chat",
        description="chat: the tokenizer's own; alpaca, none: for base models without one (docs/data.md)",
        json_schema_extra={"axolotl": "chat_template"},
    )
    date: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        None, description="YYYY-MM-DD that chat templates print; default: the day the run began, kept on resume"
    )
    max_source_length: Positive | None = Field(
        None, description="tokens of a sample before its first target; longer ones keep their end"
    )
    max_target_length: Positive | None = Field(
        None, description="tokens of a sample from its first target on; longer ones keep their beginning"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be used: ends the run, or is left out and counted"
    )
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="on_bad_row skip: share of a data set's rows above which the run is refused"
    )
    cache_dir: ExpandedPath | None = Field(
        None,
        description="folder of tokenized data; default <output_dir>/data_cache",
        json_schema_extra={"axolotl": "dataset_prepared_path"},
    )

    def train_sets(self) -> dict[str, DatasetConfig]:
        """The data sets that are trained on, by the key that messages name."""
        return _by_key("data.train", self.train)

    def eval_sets(self) -> dict[str, DatasetConfig]:
        """The held-out data sets likewise; empty if there are none."""
        return {} if self.eval is None else _by_key("data.eval", self.eval)

    def all_sets(self) -> dict[str, DatasetConfig]:
        """Both, those that are trained on first."""
        return {**self.train_sets(), **self.eval_sets()}


def _by_key(key: str, given: DatasetConfig | list[DatasetConfig]) -> dict[str, DatasetConfig]:
    if isinstance(given, list):
        return {f"{key}[{index}]": dataset for index, dataset in enumerate(given)}
    return {key: given}
