"""The scripts that no test starts (benchmarks, studies) import only names that their modules define."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {"trl"}  # compared with, and installed for that alone
SCRIPTS = sorted(file for folder in ("benchmarks", "studies") for file in (ROOT / folder).rglob("*.py"))


def module_file(module: str, script: Path) -> Path | None:
    """The file of one of our modules, looked for from the root and beside the script; None: installed or unknown."""
    for folder in (ROOT, script.parent, script.parent.parent):
        path = folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
        if path.is_dir():
            return path
    return None


@cache
def names_of(file: Path) -> set[str]:
    """Every name that a module's top level defines or imports; of a package also its modules."""
    around = {found.stem for found in (file if file.is_dir() else file.parent).iterdir()}
    if file.is_dir():
        return around
    names = around if file.name == "__init__.py" else set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names.update(alias.asname or alias.name.split(".")[0] for alias in aliases)
    return names


def unresolved(script: Path) -> list[str]:
    """The imports of `script` that nothing provides."""
    missing = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [(str(node.module), alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            file = module_file(module, script)
            if file is None:
                package = module.split(".")[0]
                if package not in NOT_OURS and importlib.util.find_spec(package) is None:
                    missing.append(module)
            elif name is not None and name not in names_of(file):
                missing.append(f"{module}.{name}")
    return missing


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_every_import_is_there(script):
    assert unresolved(script) == []


def test_a_name_that_is_gone_is_seen(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import nowhere.to_be_found\nfrom dist_qft.base_model.loss import Rows, gone\nimport torch\n")
    assert unresolved(script) == ["nowhere.to_be_found", "dist_qft.base_model.loss.gone"]
