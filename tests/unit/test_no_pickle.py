"""No file and no peer can have its code run: nothing in the package unpickles or evaluates."""

import ast
import re
from pathlib import Path

import pytest

import dist_qft

# Whatever unpickles or evaluates runs code that a file, or a peer, brings along.
FORBIDDEN = re.compile(
    r"(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)(\..*)?"
    r"|(torch|np|numpy|yaml)\.(load|save)|eval|exec"
    r"|(.*\.)?(broadcast|all_gather|gather|scatter|send|recv)_object(_list)?"
)


def forbidden_uses(source: str) -> list[str]:
    """`line: name` of each import and call in Python source that FORBIDDEN matches."""
    uses = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)]
        uses += [f"{node.lineno}: {name}" for name in names if FORBIDDEN.fullmatch(name)]
    return uses


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.save(tensor, path)",
        "np.load(path)",
        "yaml.load(text)",
        "eval(text)",
        "dist.all_gather_object(parts, own)",
        "torch.distributed.broadcast_object_list(own)",
    ],
)
def test_the_search_for_unpickling_finds_it(source):
    assert len(forbidden_uses(f"x = 1\n{source}\nmodel.eval()")) == 1


def test_nothing_in_the_package_unpickles_or_evaluates():
    root = Path(dist_qft.__file__).parent
    sources = sorted(root.rglob("*.py"))
    assert len(sources) > 40
    assert {str(path): uses for path in sources if (uses := forbidden_uses(path.read_text()))} == {}
