"""The settings that all tile adapters share: which layers get one, its rank and scale, and a schedule of exceptions.

A tile adapter's dW is constant on tiles of `repeat` outputs by `pool` inputs. A method says by its `factors` which of
its keys shape the tile, and by `tile` how. Layers are not known here: `dist_qft.methods.adapters.schedule` applies the
schedule to a model's.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from dist_qft.config.fault import Fault, KeyPath, value_fault
from dist_qft.config.methods.method import MethodConfig
from dist_qft.config.section import Fraction, NonNegative, Positive, PositiveNumber, Section

if TYPE_CHECKING:
    from dist_qft.config.schema import RunConfig

PoolMode = Annotated[
    Literal["mean", "sum"],
    Field(
        description="mean or sum of pooled inputs. The mean makes dW `pool` times smaller than the sum, "
        "so it needs a higher learning rate"
    ),
]
RsLora = Annotated[
    bool,
    Field(
        description="scale by alpha / sqrt(rank) instead of alpha / rank, so that a high rank does not slow learning",
        json_schema_extra={"peft": "use_rslora", "axolotl": "peft_use_rslora"},
    ),
]
_RULE_RANK = "rank of these layers' adapters; where the method has none, it only sets the scale"


class Tile(NamedTuple):
    """The shape of one adapter: dW is constant on tiles of `repeat` outputs by `pool` inputs.

    `inner` is the number of rows of A when there is a B; None for a single matrix.
    """

    pool: int
    repeat: int
    inner: int | None


class ScheduleRule(Section):
    """Exceptions for some layers; later rules win. A rule sets at least one thing besides its selection."""

    layers: str | list[str] = Field("all", description="layer types (q_proj, ...), `attention`, `mlp` or `all`")
    depth: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] | None = Field(
        None, description="first and last decoder layer, both included; default all"
    )
    rank: Positive | None = Field(None, description=_RULE_RANK, json_schema_extra={"peft": "rank_pattern"})
    alpha: PositiveNumber | None = Field(
        None, description="alpha of these layers' adapters", json_schema_extra={"peft": "alpha_pattern"}
    )
    skip: bool = Field(False, description="attach nothing to these layers")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: Any) -> Any:
        """A null is the same as no key; a config that was saved whole names every key of every method."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


class TileMethod(MethodConfig):
    """A method that attaches tile adapters to linear layers.

    Attributes:
        factors: key -> the layer sizes that its value must divide.
        balancing: the factors that a study's "balancing factor" sets, in the order of its values; empty if none.
        balancing_name: the papers' word for it.
        ranked: True if the rank shapes the matrices; False if it only sets the scale.
    """

    rank: Positive = Field(
        64,
        description="inner width r of the pair A, B (qahira has no pair), and the divisor of the scale alpha / rank",
        json_schema_extra={"peft": "r", "axolotl": "lora_r"},
    )
    alpha: PositiveNumber = Field(
        16.0,
        description="dW is scaled by alpha / rank",
        json_schema_extra={"peft": "lora_alpha", "axolotl": "lora_alpha"},
    )
    dropout: Fraction = Field(
        0.0,
        description="dropout on an adapter's (pooled) inputs",
        json_schema_extra={"peft": "lora_dropout", "axolotl": "lora_dropout"},
    )
    targets: str | list[str] = Field(
        "all-linear",
        description="layers that get an adapter: `all-linear`, layer types as in a schedule, or a mixture's `experts`",
        json_schema_extra={"peft": "target_modules", "axolotl": "lora_target_modules"},
    )
    schedule: Sequence[ScheduleRule] = Field([], description="exceptions by layer type and depth, in order")
    train_tokens: str | list[str | int] | None = Field(
        None,
        description="tokens of the tokenizer, or ids, whose rows of embedding and LM head are trained as well, such as "
        "chat markers that the base never met",
        json_schema_extra={"peft": "trainable_token_indices", "axolotl": "peft_trainable_token_indices"},
    )

    factors: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    balancing: ClassVar[tuple[str, ...]] = ()
    balancing_name: ClassVar[str] = ""
    ranked: ClassVar[bool] = True

    @classmethod
    def knobs(cls) -> list[str]:
        """The keys that a schedule rule may set for its layers."""
        return ["rank", "alpha", *cls.factors]

    def given(self, section: Section) -> dict[str, Any]:
        """The knobs that this section, or a rule of its schedule, sets."""
        return {knob: value for knob in self.knobs() if (value := getattr(section, knob, None)) is not None}

    def alpha_at(self, rank: float) -> float:
        """The alpha that keeps the scale of dW at another rank."""
        if getattr(self, "use_rslora", False):
            return self.alpha * math.sqrt(rank / self.rank)
        return self.alpha / self.rank * rank

    def alpha_held(self, factors: Mapping[str, Any]) -> float:
        """The alpha that keeps the size of dW's entries when the tile's factors change.

        dW is alpha / rank times B A, and where inputs are averaged divided by the number that one mean covers.
        """
        pools = [self.tile({**self.given(self), **changed}).pool for changed in ({}, factors)]
        averages = getattr(self, "pool_mode", "mean") == "mean"
        return self.alpha * pools[1] / pools[0] if averages else self.alpha

    @property
    def tokens_to_train(self) -> list[str | int]:
        """`train_tokens` as a list; empty without."""
        given = self.train_tokens
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    def tile(self, knobs: Mapping[str, Any]) -> Tile:
        """The tile of a layer with these values of the knobs."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The settings of an adapter that are the same for all layers, as far as the method has them."""
        keys = ("pool_mode", "dropout", "merge_aware", "use_rslora")
        return {key: getattr(self, key) for key in keys if key in type(self).model_fields}

    def faults(self, run: "RunConfig") -> Iterator[Fault]:
        """Schedule rules whose depth ends before it begins, that set nothing, or that set a value beside `skip`."""
        yield from self._token_faults()
        for index, rule in enumerate(self.schedule):
            path: KeyPath = ("method", "schedule", index)
            if rule.depth is not None and rule.depth[0] > rule.depth[1]:
                yield value_fault((*path, "depth"), f"got {rule.depth}, must be first <= last")
            given = sorted(rule.model_fields_set - {"layers", "depth", "skip"})
            if not given and "skip" not in rule.model_fields_set:
                yield value_fault(path, f"the rule sets nothing; give {', '.join(self.knobs())} or skip")
            elif rule.skip and given:
                yield value_fault(path, f"skip leaves no use for {', '.join(given)}; give one or the other")

    def _token_faults(self) -> Iterator[Fault]:
        """Lists of tokens that are empty or name one twice, and whole tables."""
        path: KeyPath = ("method", "train_tokens")
        given = self.tokens_to_train
        if self.train_tokens == "all":
            yield value_fault(
                path,
                "got all, must be a list of tokens: whole tables are the largest weights of a model, and every rank "
                "would hold them in float32 with two moments; adapters reach what all tokens have in common",
            )
        elif self.train_tokens is not None and not given:
            yield value_fault(path, "got [], must name at least one token; or remove it")
        elif twice := [token for token, count in Counter(given).items() if count > 1]:
            yield value_fault(path, f"got '{twice[0]}' twice, must be different tokens")


class BlockMethod(TileMethod):
    """A method whose tiles are made to match the base's quantization blocks, so that dW merges exactly."""

    pool_mode: PoolMode = "mean"
    merge_aware: bool = Field(
        False,
        description="train with zeros as the exact merge will write them (rounded to float16), "
        "so that merging changes no logit",
    )

    def faults(self, run: "RunConfig") -> Iterator[Fault]:
        """Faults of the schedule, and merge-aware training on a base without zeros or with dropout."""
        yield from super().faults(run)
        if not self.merge_aware:
            return
        linear = run.quantization.linear
        if linear not in ("affine4", "auto", "stored"):
            yield value_fault(
                ("method", "merge_aware"), f"{linear} has no zeros to take dW; choose quantization.linear: affine4"
            )
        if self.dropout:
            yield value_fault(("method", "dropout"), f"got {self.dropout}, must be 0 with merge_aware")
