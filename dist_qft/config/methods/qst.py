"""QST, quantized side tuning (arXiv 2401.07159): a narrow network beside the base, and no gradient through the base."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dist_qft.config.fault import Fault, value_fault
from dist_qft.config.methods.method import MethodConfig
from dist_qft.config.section import Positive

if TYPE_CHECKING:
    from dist_qft.config.schema import RunConfig

Reduction = Annotated[int, Field(ge=2)]
Downsample = Literal["adapter", "lora", "linear", "maxpool", "avgpool"]
Compat = Literal["paper", "released"]
_RANKED = ("adapter", "lora")


class QstConfig(MethodConfig):
    """`qst`: a side network `reduction` times narrower than the base. The defaults are the paper's."""

    name: Literal["qst"] = Field(
        description="a narrow side network, trained without backward through the base (QST)",
        json_schema_extra={"axolotl": "adapter"},
    )
    reduction: Reduction = Field(16, description="times that the side network is narrower than the base: the paper's r")
    downsample: Downsample = Field("adapter", description="how hidden states are brought to the side network's width")
    downsample_rank: Positive = Field(16, description="rank of the downsample; adapter and lora only")
    compat: Compat = Field("paper", description="follow the paper, or the authors' released code where it differs")
    init: Literal["random", "pruned"] = Field(
        "random", description="start from random weights, or from every r-th row and column of the base's own"
    )
    cache: Literal["none", "disk"] = Field(
        "none", description="keep the base's hidden states on disk, so that epochs after the first do not run the base"
    )
    merge_obstacle: ClassVar[str | None] = (
        "a side network (qst) runs beside the base and is not folded into it; serve the run itself "
        "(dist_qft.load, dist-qft generate), or train one of the other methods"
    )

    unused: ClassVar[Mapping[str, str]] = {
        "train_tokens": "the gradient of the embedding's rows comes back through the base, which it runs without"
    }

    def faults(self, run: "RunConfig") -> Iterator[Fault]:
        """Faults: a rank for a downsample without one, and recomputation of activations that qst never keeps."""
        # Compared with the default: a config that was saved whole names every key.
        changed = self.downsample_rank != type(self).model_fields["downsample_rank"].default
        if changed and self.downsample not in _RANKED:
            yield value_fault(
                ("method", "downsample_rank"),
                f"{self.downsample} has no rank; remove it or use {' or '.join(_RANKED)}",
            )
        if run.train.gradient_checkpointing:
            yield value_fault(
                ("train", "gradient_checkpointing"), "qst keeps nothing of the base for backward; remove it"
            )

    def warnings(self, run: "RunConfig") -> Iterator[str]:
        """Warn of a cache that is written and never read."""
        if self.cache == "disk" and run.train.max_steps is None and run.train.num_train_epochs <= 1:
            yield "method.cache: written and never read, train.num_train_epochs is 1 or less"
