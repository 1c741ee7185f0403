"""The contract of an export target: one kind of result, which it plans, makes and reads back.

A target decides from shapes alone whether it can hold the trained model (`recipe`). With the loaded model it computes
the logits that a reader of the result will see, and hands out a `Writer` (`convert`). For `verify` it reads the result
again (`read_back`). Each target is one file in `writers`, listed in `targets`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import MergeTarget, RunConfig
from dist_qft.errors import UserError
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.recipe import Kind, MergeRequest, Recipe
from dist_qft.methods.adapters.schedule import TileSettings


class OpenResult(Protocol):
    """A file or folder that rank 0 has begun to write. `write` for each weight, `finish`; `close` in any case.

    Attributes:
        difference: the loss of conversions so far.
    """

    difference: Difference

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        """Take one weight's tensors, whole and on the CPU."""

    def finish(self) -> None:
        """Write the rest."""

    def close(self) -> None:
        """Give up open files; the temporary result is removed by the caller, who chose its name."""


class Writer(Protocol):
    """A writer of one result. Every rank has one, to agree on the tensors that are gathered; rank 0 opens it."""

    def notes(self) -> list[str]:
        """Reasons in words why the result is not quite the model that was run; empty if there are none."""

    def wanted(self, path: str) -> tuple[str, ...]:
        """The packed tensors of this weight that `write` needs; without any, `write` is not called for it."""

    def open(self, temporary: Path) -> OpenResult:
        """Begin the file or folder under this name."""


class Converted(NamedTuple):
    """A model ready to be written: the logits that the result's reader will see, and the difference known so far."""

    logits: Tensor
    difference: Difference
    writer: Writer


@dataclass(frozen=True)
class Probe:
    """Token ids on which models are compared, and the device that runs them."""

    ids: list[int]
    device: torch.device


@dataclass(frozen=True)
class CardText:
    """The lines of a model card that differ between kinds of result (`model_card`).

    Attributes:
        language: of the command, for highlighting.
        command: how the result is loaded; `{name}` stands for the result and `{base}` for the base model.
        relation: `base_model_relation` of the Hub's metadata.
        library: `library_name` there.
        modelfile: whether a Modelfile for Ollama is written beside the result.
    """

    language: str
    command: str
    relation: str = "finetune"
    library: str | None = None
    modelfile: bool = False


class Target(ABC):
    """One kind of result.

    Attributes:
        name: as in `--to` and `merge.at_end`.
        default_name: of the result inside a run's folder; a name with a suffix is a file, any other a folder.
        requantizes: True if `--requantize` makes sense for it.
        card: its part of a model card; None for a result that is not a model, which gets no card.
    """

    name: ClassVar[MergeTarget]
    default_name: ClassVar[str]
    requantizes: ClassVar[bool] = False
    card: ClassVar[CardText | None] = None

    @property
    def is_file(self) -> bool:
        """True for a result that is one file, False for a folder."""
        return bool(Path(self.default_name).suffix)

    def require_name(self, path: Path) -> None:
        """Refuse a path that looks like a folder's for a target that writes a file, or the other way round."""
        suffix = Path(self.default_name).suffix
        if self.is_file and path.suffix != suffix:
            raise UserError(f"'{path}': {self.name} is written to a file whose name ends in {suffix}")
        if not self.is_file and path.suffix == ".gguf":
            raise UserError(f"'{path}': {self.name} is written to a folder")

    @abstractmethod
    def recipe(
        self, request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
    ) -> Recipe:
        """Decide how to make this result from adapters of these tiles; `base` may be on the meta device.

        Raises:
            UserError: the result cannot hold the trained model.
        """

    @abstractmethod
    def convert(self, live: LiveModel, recipe: Recipe, config: RunConfig, probe: Probe) -> Converted:
        """Make the result in memory, as far as it is not made while it is written. Collective.

        The live model may be changed; its adapters do not belong on it any more.
        """

    def hints(self, recipe: Recipe, config: RunConfig) -> list[str]:
        """Lines for the user about loading the result, shown when it has been published."""
        return []

    @abstractmethod
    def read_back(self, result: Path, kind: Kind, live: LiveModel, probe: Probe) -> tuple[Difference, Tensor]:
        """The difference of a result's weights from the live model's, and the logits that its reader sees.

        The live model may be changed. Needs a process group of this process alone.

        Raises:
            CorruptFileError: the result is not one of this target, or not of this base.
        """
