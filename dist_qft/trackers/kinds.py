"""The trackers that `train.report_to` may name, and the packages that they need."""

from collections.abc import Sequence
from importlib.util import find_spec

from dist_qft.errors import SetupError

TENSORBOARD = "tensorboard"
TRACKERS = ("wandb", "mlflow", "trackio")  # each named like its package and like our extra


def chosen(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The names in `train.report_to`: "none" is empty, "all" is TensorBoard and every tracker installed here."""
    if report_to == "none":
        return ()
    if report_to == "all":
        return (TENSORBOARD, *filter(is_installed, TRACKERS))
    return tuple(dict.fromkeys([report_to] if isinstance(report_to, str) else report_to))


def trackers_in(report_to: str | Sequence[str]) -> list[str]:
    """The names in `train.report_to` but TensorBoard."""
    return [name for name in chosen(report_to) if name in TRACKERS]


def is_installed(name: str) -> bool:
    """True for a package that can be imported; a folder of that name, such as W&B's own `wandb/`, is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def require_installed(report_to: str | Sequence[str]) -> None:
    """Refuse a tracker whose package is missing. Imports none of them.

    Raises:
        SetupError: names the package and its installation.
    """
    for name in trackers_in(report_to):
        if not is_installed(name):
            raise SetupError(
                f"train.report_to: {name} needs the package {name}, which is not installed; "
                f"pip install 'dist-qft[{name}]'"
            )
