"""The command line: one short function per verb, and the one place where an error becomes an exit code.

Verbs import what they need when they run: `--help` and a refused config must not wait for torch.
"""

# The order of the imports is the order of the verbs in --help.
from dist_qft.cli import runs, results, studies, setup  # isort: skip  # noqa: F401
from dist_qft.cli.app import app
from dist_qft.cli.entry import main, print_error

__all__ = ["app", "main", "print_error"]
