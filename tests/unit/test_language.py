"""The language rules of CONTRIBUTING.md that a program can check: first lines of docstrings, forms of messages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("dist_qft", "tests", "benchmarks", "studies")
RAISED = ("UserError", "SetupError", "CorruptFileError", "NumericError", "PeerLostError", "RowError", "OverrideError")

# A first line is imperative or a noun phrase: none of these words begins one.
RELATIVE = re.compile(r"(?:What|Which|Whose|Whether|Why|How|Where|Who|When|That which|Such as|Inside,|From now on)\b")
# Nouns are not left out, and "X is no Y" is said as "X is not a Y".
RIDDLE = re.compile(r"\b(?:that|those) which\b", re.IGNORECASE)
# A refusal says "must be", not one of five other words for it.
OTHER_FORMS = re.compile(r"\ballowed:|\ballowed is\b|\blegal:|, need |; need |(?<!here )\bis no (?!smaller)[a-zA-Z]")


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The texts of errors and of config faults, with `{...}` for values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            for argument in node.args if name in (*RAISED, "value_fault", "fault") else ():
                if isinstance(argument, ast.Constant | ast.JoinedStr):
                    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
                    yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)


def test_first_lines_are_imperatives_or_noun_phrases() -> None:
    found = [(file, *doc) for file, tree in trees(*FOLDERS) for doc in docstrings(tree)]
    assert len(found) > 2000, "the walk finds the docstrings"
    assert not [(file, line, text.splitlines()[0]) for file, line, text in found if RELATIVE.match(text)]
    assert not [(file, line) for file, line, text in found if RIDDLE.search(text)]


def test_refusals_have_one_form() -> None:
    found = [(file, *message) for file, tree in trees("dist_qft") for message in messages(tree)]
    assert len(found) > 300, "the walk finds the messages"
    assert not [entry for entry in found if OTHER_FORMS.search(entry[2])]


def test_the_rules_find_what_they_are_for() -> None:
    tree = ast.parse('def f():\n    """What is written."""\n    raise UserError(f"a: got {x}, need 3")\n')
    ((_, text),) = docstrings(tree)
    ((_, message),) = messages(tree)
    assert RELATIVE.match(text) and message == "a: got {}, need 3" and OTHER_FORMS.search(message)
    assert not RELATIVE.match("Whole files.") and not OTHER_FORMS.search("a: got 1, must be 2")
