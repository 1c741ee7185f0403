"""What defines a side network besides the base: the config's `method` section with every default filled in."""

from typing import Literal

from pydantic import ValidationError

from dist_qft.config.schema import Downsample, MethodConfig, Positive, Reduction, Section
from dist_qft.errors import UserError

POOLS = ("maxpool", "avgpool")


class SideSettings(Section):
    """Settings of a side network, as stored in `adapter_config.json`; the defaults are the paper's.

    `compat: released` is the authors' published code where it differs from the paper: vector gates that start at 0.5,
    a mix through the sigmoid of a vector that starts at 1 (so not at the base model), and no biases in the adapter.
    """

    reduction: Reduction = 16
    downsample: Downsample = "adapter"
    downsample_rank: Positive = 16
    compat: Literal["paper", "released"] = "paper"

    @classmethod
    def of(cls, method: MethodConfig) -> "SideSettings":
        """The settings that a `method` section gives."""
        given = {name: getattr(method, name) for name in cls.model_fields}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @classmethod
    def from_dict(cls, fields: object, where: str) -> "SideSettings":
        """The inverse of `model_dump`; `where` names the source in the UserError that lists what is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            faults = [": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors()]
            raise UserError(f"{where}: {'; '.join(faults)}") from None

    @property
    def pools(self) -> bool:
        """Whether the downsample has no parameters, so that its results never change either."""
        return self.downsample in POOLS
