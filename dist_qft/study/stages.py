"""The sections of a study file for what surrounds a training run: tuning before it, a merge after it, contrasts."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dist_qft.config.section import NonNegative, PositiveNumber, Section, Seed, Text

When = Annotated[dict[str, Text], Field(description="axis -> label: only for these combinations of the axes")]


class TuneMetric(Section):
    """The figure by which a search chooses, for some combinations of the axes or for all."""

    metric: Text = Field(description="loss, merged_loss, or a metric such as accuracy")
    when: When = {}


class TuneSettings(Section):
    """A search over one number, such as the learning rate, before the runs that are compared."""

    axis: Text = Field("train.learning_rate", description="key.sub of the number")
    set: dict[Text, Any] = Field(description="key.sub -> value: settings of the search's runs, its held-out data first")
    factor: Annotated[float, Field(gt=1, le=1000)] = Field(2.0, description="between neighbouring values")
    tries: Annotated[int, Field(ge=1, le=64)] = Field(5, description="values around the one that the config has")
    values: list[PositiveNumber] | None = Field(None, min_length=1, description="the values, instead of tries")
    widen: NonNegative = Field(4, description="further values at most, where the best is the first or last")
    seeds: list[Seed] = Field([1000], min_length=1, description="of the search's runs")
    metric: list[TuneMetric] = Field(
        [], description="figure that chooses, or several for some combinations each; default: the study's metric"
    )
    each: Literal["subject", "variant"] = Field(
        "subject", description="what has a search of its own: a combination of the axes, or also every variant"
    )

    @field_validator("metric", mode="before")
    @classmethod
    def _one_metric(cls, given: Any) -> Any:
        """A single figure is for all combinations."""
        return [{"metric": given}] if isinstance(given, str) else given

    def metric_of(self, subject: Mapping[str, str], otherwise: str) -> str:
        """The figure that chooses for a combination of the axes: the first that applies, or that of the study."""
        return next((each.metric for each in self.metric if applies(each.when, subject)), otherwise)


class MergeStage(Section):
    """A merge of every run's adapters, whose result is measured on the held-out data as `merged_loss`."""

    to: Literal["gguf", "quantized", "dense"] = Field(description="as `dist-qft merge --to`")
    requantize: Literal["nf4", "affine4"] | None = Field(None, description="as `dist-qft merge --requantize`")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of a dense result")
    when: When = {}


class Contrast(Section):
    """A comparison of two combinations of the axes, each by its reference run."""

    claim: Text = Field(description="statement that a positive effect speaks for")
    better: Text = Field(description="labels of the axes, joined by ', ': the one that the claim prefers")
    than: Text = Field(description="the other one")
    metric: Text | None = Field(None, description="figure that is compared; default: the study's metric")
    than_metric: Text | None = Field(None, description="figure of the other one, if it is another")
    margin: Annotated[float, Field(ge=0)] = Field(0.0, description="the claim allows to be worse by so much")
    primary: bool = Field(False, description="not corrected for the number of questions, which the others are (Holm)")

    def figures(self, metric: str) -> tuple[str, str]:
        """The figure of each side, where `metric` is the study's."""
        first = self.metric or metric
        return first, self.than_metric or first


Keep = Annotated[
    list[Literal["adapter", "merged"]], Field(description="what stays of a run beside its figures; default nothing")
]


def applies(when: Mapping[str, str], subject: Mapping[str, str]) -> bool:
    """True if a combination of the axes, as axis -> label, is one of those that `when` names."""
    return all(subject[axis] == label for axis, label in when.items())
