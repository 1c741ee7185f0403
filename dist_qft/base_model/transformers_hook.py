"""Tell transformers of our quantized folders as soon as it is imported, and not before.

`import dist_qft` must make `AutoModelForCausalLM.from_pretrained` work on them, and must not itself take the seconds
that importing transformers takes. So the registration waits for transformers, whichever of the two comes first.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the quantizer of our folders: now if transformers is there, else when it is imported."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """A finder that finds one module as the other finders do, and adds a call to its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010 (a method, for the type checker)
        return spec


def _register() -> None:
    from dist_qft.base_model import transformers_quantizer  # noqa: F401 (its decorators register it)
