"""The contract of the `method` section, whichever method it is."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from dist_qft.config.fault import Fault
from dist_qft.config.paths import ExpandedPath
from dist_qft.config.section import Section

if TYPE_CHECKING:
    from dist_qft.config.schema import RunConfig

# Until methods had classes of their own, one section had the keys of all of them. A config that was saved then, as
# checkpoints have it, names every one, and the keys of other methods say nothing.
_NULLABLE = {"balance", "pool", "repeat", "reduction", "downsample", "downsample_rank", "compat", "init", "cache"}
_KEYS_OF_ALL = {"name", "rank", "alpha", "pool_mode", "dropout", "merge_aware", "targets", "schedule", *_NULLABLE}
# As a key of another method these values have always been accepted. Of a key of its own a method took null as default.
_SAYS_NOTHING = {"pool_mode": "mean", "merge_aware": False, **dict.fromkeys(_NULLABLE)}


class MethodConfig(Section):
    """The `method` section. A subclass is one method: its keys, their defaults, and the rules between them.

    Attributes:
        name: the value of `method.name` that chooses the class.
        merge_obstacle: the reason why the trainables cannot be merged into the base, with a remedy; None if they can.
        unused: keys of other methods -> the reason why this one has no use for them, where it is not plain.
    """

    name: str
    init_from: ExpandedPath | None = Field(
        None,
        description="run, checkpoint, or for qlora a PEFT LoRA folder or its Hub id: values that a new run begins with",
        json_schema_extra={"axolotl": "lora_model_dir"},
    )
    merge_obstacle: ClassVar[str | None] = None
    unused: ClassVar[Mapping[str, str]] = {}

    @property
    def tokens_to_train(self) -> list[str | int]:
        """The tokens whose rows of the vocabulary tables are trained; empty for a method that trains none."""
        return []

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys of the section besides `name`: the method's own first, then those of every method."""
        shared = [key for key in MethodConfig.model_fields if key != "name"]
        return [*(key for key in cls.model_fields if key not in MethodConfig.model_fields), *shared]

    def faults(self, run: "RunConfig") -> Iterator[Fault]:
        """Broken rules between keys of this section, and between them and the rest of the config."""
        yield from ()

    def warnings(self, run: "RunConfig") -> Iterator[str]:
        """Settings that are allowed but probably not meant, each as a line that starts with its key."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_says_nothing(cls, values: Any) -> Any:
        """Drop a null that stands for a default, and keys of other methods that say nothing."""
        if not isinstance(values, dict):
            return values
        saved_whole = values.keys() >= _KEYS_OF_ALL

        def says_nothing(key: str) -> bool:
            if key in cls.model_fields:
                return key in _NULLABLE and values[key] is None
            return key in _KEYS_OF_ALL and (saved_whole or (key in _SAYS_NOTHING and values[key] == _SAYS_NOTHING[key]))

        return {key: value for key, value in values.items() if not says_nothing(key)}
