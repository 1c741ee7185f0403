"""The parts of every section of the config tree: the strict base class and the ranges that several keys share."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

# Upper bounds that no sensible value comes near, and beyond which seconds, bytes and counts leave the types that the
# libraries keep them in, hours after the start.
LARGEST_COUNT, LARGEST_SEED, LARGEST_NUMBER, LARGEST_MEGABYTES = 2**31 - 1, 2**63 - 1, 1e300, 1e12
BEYOND_ALL = (
    LARGEST_COUNT,
    LARGEST_SEED,
    LARGEST_NUMBER,
    LARGEST_MEGABYTES,
)  # not told of a value that is too small
Positive = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
PositiveNumber = Annotated[float, Field(gt=0, le=LARGEST_NUMBER)]
Megabytes = Annotated[float, Field(gt=0, le=LARGEST_MEGABYTES)]
MegabytesOrNone = Annotated[float, Field(ge=0, le=LARGEST_MEGABYTES)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]


# The tags of a union of one section and a list of them. They stand in pydantic's locations, but not in a file.
UNION_TAGS = ("one", "several")

# Programs whose name for a key may stand in its field: `json_schema_extra={"peft": "r", "axolotl": "lora_r"}`.
PROGRAMS = {"transformers": "Transformers", "peft": "PEFT", "trl": "TRL", "axolotl": "axolotl"}


class Section(BaseModel):
    """A part of the config: unknown keys, silent type conversions, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


def changed(section: Section, setting: str) -> bool:
    """True if a setting is not its default.

    Being given in the file says nothing: a config that was saved whole names every setting.
    """
    return bool(getattr(section, setting) != type(section).model_fields[setting].default)


def with_defaults(section: Section, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of this section that another run stored, by key; today's defaults for keys that it did not know."""
    return {key: stored.get(key, field.default) for key, field in type(section).model_fields.items()}
