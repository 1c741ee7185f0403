"""The house rules that a program can check: which part imports which, how large files and functions may be, what the
repository's text may refer to. `docs/architecture.md` draws the same picture."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dist_qft"

# Low to high. A part may import the parts of lower floors, and of its own floor none.
FLOORS = (
    ("errors", "divisors"),
    ("ranks", "storage", "quant", "pages"),
    ("config", "launch", "trackers"),
    ("sharding", "data"),
    ("base_model",),
    ("methods",),
    ("tuned_model",),
    ("merge",),
    ("training",),
    ("train", "evaluate", "generate", "chat", "plan", "doctor", "init", "harness"),
    ("study", "bench", "report", "hub"),
    ("__init__",),  # the public interface: dist_qft.load
    ("cli",),
    ("__main__",),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# Downward, and still not allowed: methods and engines know nothing of each other.
FORBIDDEN = {("methods", "sharding")}
# Upward imports that are left: this may only shrink.
UPWARD: set[tuple[str, str]] = set()

MAX_FILE, MAX_FUNCTION, MAX_ROOT_FILES = 300, 60, 12
# What is above a limit today, and how far: these may only shrink.
LONG_FILES = {
    "tests/ranks/training/test_flat_parameters.py": 397,
}
LONG_FUNCTIONS: dict[str, int] = {}

SOURCES = sorted(
    file for folder in ("dist_qft", "tests", "benchmarks", "studies") for file in (ROOT / folder).rglob("*.py")
)
TEXTS = [
    *SOURCES,
    ROOT / "README.md",
    *sorted(
        file
        for folder in ("docs", "configs", "launch", "slurm", "studies", ".ci")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {"", ".md", ".yaml", ".sh", ".toml"} and file.is_file()
    ),
]


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def part(module: str) -> str:
    """The folder, or the file of the package's root, that a module belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names if name.name.split(".")[0] == "dist_qft")
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dist_qft":
        for name in node.names:
            below = f"{node.module}.{name.name}"
            yield below if below in MODULES else node.module


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when the module is imported, except those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_module_level(child)


def test_every_part_has_its_floor() -> None:
    assert {part(module) for module in MODULES} == set(FLOOR)


def test_imports_run_downward() -> None:
    arrows = {
        (part(module), part(target)): f"{module} imports {target}"
        for module, file in MODULES.items()
        for node in ast.walk(tree(file))
        for target in imported(node)
        if part(module) != part(target)
    }
    upward = {arrow for arrow in arrows if FLOOR[arrow[1]] >= FLOOR[arrow[0]] or arrow in FORBIDDEN}
    assert not [arrows[arrow] for arrow in upward - UPWARD]
    assert upward >= UPWARD, "a listed upward import is gone: take it off UPWARD"


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {
        module: {target for node in at_module_level(tree(file)) for target in imported(node) if target != module}
        for module, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " > ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_root_holds_one_file_per_verb() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_ROOT_FILES


def assert_within(sizes: dict[str, int], limit: int, known: dict[str, int]) -> None:
    assert not {name: size for name, size in sizes.items() if size > known.get(name, limit)}
    assert not {name for name in known if sizes.get(name, 0) <= limit}, "no longer too long: take it off the list"


def test_every_type_ignore_has_a_code_and_a_reason() -> None:
    good = re.compile(r"# type: ignore\[[a-z, -]+\]  # \w")
    bare = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in MODULES.values()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if "type: ignore" in line and not good.search(line)
    ]
    assert not bare


def test_files_are_short() -> None:
    sizes = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in SOURCES}
    assert_within(sizes, MAX_FILE, LONG_FILES)


def test_functions_are_short() -> None:
    sizes = {
        f"{file.relative_to(ROOT)}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for file in SOURCES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert_within(sizes, MAX_FUNCTION, LONG_FUNCTIONS)


def test_names_of_test_files_are_unique() -> None:
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


# "section 3.2" of a paper stands beside its arXiv number or link; "NOTES B.2" is a page that nobody else has.
SECTION = re.compile(r"\bsections? [A-Z]?\.?\d|\b[A-Z]{4,}(?:\.md)? [A-Z]\.\d")
SOURCE_OF_SECTION = re.compile(r"arXiv|https?://")
PAGE = re.compile(r"\bdocs/[\w/.-]+\.(?:md|jsonl)\b|(?<![\w/])[A-Z]{4,}\.md\b")


def test_text_refers_to_nothing_outside_the_repository() -> None:
    lines = [
        (str(file.relative_to(ROOT)), line)
        for file in TEXTS
        if file != Path(__file__)
        for line in file.read_text().splitlines()
    ]
    assert not [at for at in lines if SECTION.search(at[1]) and not SOURCE_OF_SECTION.search(at[1])]
    assert not [(file, page) for file, line in lines for page in PAGE.findall(line) if not (ROOT / page).is_file()]
