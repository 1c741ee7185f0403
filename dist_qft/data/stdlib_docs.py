"""Questions and answers made from the documentation inside Python's own standard library.

Real text by many hands, on every machine that runs Python, so that a run needs no download. Each public module,
class, function and method with a docstring gives one conversation: a question about it, answered by its signature and
its docstring. Sources are parsed, never imported. Everything is deterministic for one Python version.

The held-out split is by top-level module: nothing of a held-out module is seen in training. Several thousand samples;
parsing takes a few seconds.
"""

import ast
import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1  # to be raised when the samples of one Python version change
SPLITS = ("train", "eval")
MAX_ANSWER_CHARACTERS = 600
MIN_DOCSTRING_CHARACTERS = 30

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_QUESTIONS = {
    "module": (
        "What is the Python module `{name}` for?",
        "Describe the `{name}` module of Python's standard library.",
        "What does Python's `{name}` module offer?",
    ),
    "class": (
        "What is the class `{name}` in Python?",
        "What is `{name}` used for in Python?",
        "Describe the Python class `{name}`.",
    ),
    "function": (
        "What does `{name}` do in Python?",
        "How is the Python function `{name}` called, and what does it do?",
        "Explain the function `{name}` from Python's standard library.",
        "What is `{name}` for?",
    ),
    "method": (
        "What does the method `{name}` do in Python?",
        "How is `{name}` called, and what does it do?",
        "Explain the method `{name}` from Python's standard library.",
    ),
}
_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def load(split: str) -> list[dict[str, Any]]:
    """The samples of `split` ("train" or "eval"), in the order of a hash of their names.

    So the first n are a fair sample of all modules, for every n. Each is
    {"messages": [user, assistant], "module": top-level module, "name": full dotted name}.
    """
    samples = _samples(Path(sysconfig.get_path("stdlib")))
    return [sample for sample in samples if is_held_out(sample["module"]) == (split == "eval")]


@functools.cache  # a run wants both splits, and parsing takes seconds
def _samples(root: Path) -> list[dict[str, Any]]:
    """The samples of both splits from the modules below `root`, in order."""
    seen: set[str] = set()
    samples = []
    for module, path in _public_modules(root):
        top_level = module.partition(".")[0]
        for kind, name, signature, docstring in _documented(module, ast.parse(path.read_bytes())):
            # Modules repeat each other's text (posixpath and ntpath, say): only its first owner keeps it, or the
            # held-out split would hold what training has seen.
            if len(docstring) < MIN_DOCSTRING_CHARACTERS or docstring in seen:
                continue
            seen.add(docstring)
            messages = _messages(kind, name, signature, docstring)
            samples.append({"messages": messages, "module": top_level, "name": name})
    return sorted(samples, key=lambda sample: _stable_hash(f"place of {sample['name']}"))


def is_held_out(top_level_module: str) -> bool:
    """True if a module belongs to the `eval` split: about one module in ten, by a hash of its name."""
    return _stable_hash(f"split of {top_level_module}") % 10 == 0


def _public_modules(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        # The first test also drops site-packages and whatever else was put beside the standard library.
        if not parts or parts[0] not in sys.stdlib_module_names:
            continue
        if not any(part.startswith("_") or part in _SKIPPED_FOLDERS for part in parts):
            yield ".".join(parts), path


def _documented(module: str, tree: ast.Module) -> Iterator[tuple[str, str, str, str]]:
    """(kind, dotted name, signature, cleaned docstring) of everything public and documented in a parsed module."""
    if docstring := ast.get_docstring(tree):
        yield "module", module, "", docstring
    for node in _public_definitions(tree.body):
        name = f"{module}.{node.name}"
        if docstring := ast.get_docstring(node):
            if isinstance(node, ast.ClassDef):
                yield "class", name, _class_signature(name, node), docstring
            else:
                yield "function", name, _call_signature(name, node), docstring
        if isinstance(node, ast.ClassDef):
            for method in _public_definitions(node.body):
                if not isinstance(method, ast.ClassDef) and (docstring := ast.get_docstring(method)):
                    method_name = f"{name}.{method.name}"
                    yield "method", method_name, _call_signature(method_name, method), docstring


def _public_definitions(body: list[ast.stmt]) -> Iterator[_FunctionNode | ast.ClassDef]:
    names = set()
    for node in body:
        # A name defined twice is a property's setter or an overload: the first carries the documentation.
        if isinstance(node, _FunctionNode | ast.ClassDef) and not node.name.startswith("_") and node.name not in names:
            names.add(node.name)
            yield node


def _class_signature(name: str, node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return f"class {name}({bases})" if bases else f"class {name}"


def _call_signature(name: str, node: _FunctionNode) -> str:
    if any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list):
        return name
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}{name}({arguments}){returns}"


def _messages(kind: str, name: str, signature: str, docstring: str) -> list[dict[str, str]]:
    phrasings = _QUESTIONS[kind]
    question = phrasings[_stable_hash(f"question about {name}") % len(phrasings)].format(name=name)
    answer = _shorten(docstring)
    if signature:
        answer = f"`{signature}`\n\n{answer}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _shorten(docstring: str) -> str:
    """The leading paragraphs that fit; of a first one that is too long, its leading lines."""
    for separator in ("\n\n", "\n"):
        kept, *rest = docstring.split(separator)
        for part in rest:
            if len(kept) + len(separator) + len(part) > MAX_ANSWER_CHARACTERS:
                break
            kept += separator + part
        if len(kept) <= MAX_ANSWER_CHARACTERS:
            return kept.rstrip()
    return kept[:MAX_ANSWER_CHARACTERS].rstrip()


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
