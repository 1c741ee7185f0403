"""The settings that, with the base, define a side network; they are stored with it."""

from pydantic import ValidationError

from dist_qft.config.methods.qst import Compat, Downsample, QstConfig, Reduction
from dist_qft.config.section import Positive, Section
from dist_qft.errors import UserError
from dist_qft.storage.stored_faults import every_fault

POOLS = ("maxpool", "avgpool")


class SideSettings(Section):
    """Settings of a side network, as stored in `adapter_config.json`.

    `compat: released` is the authors' published code where it differs from the paper: vector gates that start at 0.5,
    a mix through the sigmoid of a vector that starts at 1 (so not at the base model), and no biases in the adapter.
    """

    reduction: Reduction
    downsample: Downsample
    downsample_rank: Positive
    compat: Compat

    @classmethod
    def of(cls, method: QstConfig) -> "SideSettings":
        """The settings that a `method` section gives."""
        return cls(
            reduction=method.reduction,
            downsample=method.downsample,
            downsample_rank=method.downsample_rank,
            compat=method.compat,
        )

    @classmethod
    def from_dict(cls, fields: object, where: str) -> "SideSettings":
        """The inverse of `model_dump`; `where` names the source in the UserError that lists what is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UserError(f"{where}: {every_fault(error)}") from None

    @property
    def pools(self) -> bool:
        """True if the downsample has no parameters: its results never change then."""
        return self.downsample in POOLS
