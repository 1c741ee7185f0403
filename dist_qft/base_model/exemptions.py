"""`quantization.exempt`: which weights of the decoder layers stay floats because the user says so."""

from collections.abc import Sequence

from dist_qft.errors import UserError


class Exemptions:
    """The patterns of the setting: a weight's full path, its last name, or `experts` for those of a mixture."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = list(dict.fromkeys(patterns))
        self._used: set[str] = set()

    def cover(self, path: str) -> bool:
        """True if a weight at this path, of a module or a parameter, is to stay dense."""
        module = path.removesuffix(".weight")
        parents, _, name = module.rpartition(".")
        names = {path, module, name} | ({"experts"} if parents.rpartition(".")[2] == "experts" else set())
        found = names & set(self._patterns)
        self._used |= found
        return bool(found)

    def require_used(self) -> None:
        """UserError for patterns that no weight has met."""
        unused = [pattern for pattern in self._patterns if pattern not in self._used]
        if unused:
            raise UserError(f"quantization.exempt: no linear layer is called {', '.join(map(repr, unused))}")
