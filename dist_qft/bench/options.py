"""The options of a benchmark, and the sizes that follow from them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """`quick` runs everything on a tiny model, in seconds: for trying out, its figures mean nothing."""

    device: str = "cpu"
    quick: bool = False
    ranks: int = 2

    @property
    def model(self) -> str:
        """The main model, a name of `models.NAMES`."""
        return "tiny" if self.quick else "smollm2"

    @property
    def steps(self) -> int:
        """Steps that are timed, after two that are not."""
        return 2 if self.quick else 3
