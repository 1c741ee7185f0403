"""The private APIs of `docs/private-apis.md` are there in the installed packages, and the package uses no others."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/private-apis.md").read_text()
ROWS = [
    (name, tuple(re.findall(r"`([\w/]+\.py)`", files)))
    for name, files in re.findall(r"^\| `([\w.]+)` \| (.+?) \| .+ \|$", PAGE, re.MULTILINE)
]
# What is called or overridden, and the parameters that it must take.
PARAMETERS = {
    "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._monitor_workers": {"worker_group"},
    "torch.distributed.fsdp.FSDPModule.set_custom_all_gather": {"comm"},
    "deepspeed.runtime.zero.partition_parameters.Init._convert_to_deepspeed_param": {"param"},
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload": {
        "module",
        "timers",
        "ds_config",
        "overlap_comm",
        "prefetch_bucket_size",
        "max_reuse_distance",
        "max_live_parameters",
        "param_persistence_threshold",
    },
    "transformers.masking_utils.create_causal_mask": {"config", "attention_mask", "past_key_values", "position_ids"},
}
# Private by name and public by documentation; `_saved_...` in PyTorch's notes on autograd.
DOCUMENTED = {"_exit", "_replace", "_asdict", "_saved_self", "_saved_approximate"}


def resolve(name: str) -> Any:
    """The object called `name`, or the source of the class that sets it as an attribute of its objects."""
    parts = name.split(".")
    # What torch.ops holds are objects that are made at first use; Python takes some of them for modules.
    depth = (
        1
        if parts[:2] == ["torch", "ops"]
        else next(n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n])))
    )
    found: Any = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        if inspect.isclass(found) and not hasattr(found, part):
            assert any(re.search(rf"\.{part}\b", source(each)) for each in found.__mro__), f"{name} is gone"
            return source(found)
        assert hasattr(found, part), f"{name} is gone"
        found = getattr(found, part)
    return found


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError):
        return False


def source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


@pytest.mark.parametrize(("name", "files"), ROWS, ids=[name.rpartition(".")[2] for name, _ in ROWS])
def test_the_installed_packages_have(name, files):
    found = resolve(name)
    missing = PARAMETERS.get(name, set()) - set(inspect.signature(found).parameters if name in PARAMETERS else ())
    assert not missing, f"{name} no longer takes {missing}"
    for file in files:
        assert name.rpartition(".")[2] in (ROOT / "dist_qft" / file).read_text(), f"{file} no longer uses {name}"


def test_torchrun_still_starts_the_agent_by_its_name():
    from torch.distributed.launcher import api

    assert "LocalElasticAgent(" in inspect.getsource(api.launch_agent)


def test_torchrun_still_starts_ranks_by_that_name():
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    start, handler = inspect.getsource(SubprocessContext._start), inspect.getsource(SubprocessHandler)
    assert "get_subprocess_handler(" in start and "local_rank_id=local_rank" in start
    assert "self._popen(args_str, env_vars)" in handler


def private_names(tree: ast.Module) -> set[str]:
    """The names with a leading underscore that are read from something else than `self`, or imported from a package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dist_qft"):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in names if re.match(r"_[a-z]|__\w+_ops", name)}


def own_names(tree: ast.Module) -> set[str]:
    """The names that a module defines: functions, variables, parameters, fields, attributes set on `self`."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def test_no_other_private_api_is_used():
    trees = {file: ast.parse(file.read_text()) for file in sorted((ROOT / "dist_qft").rglob("*.py"))}
    own = set().union(*map(own_names, trees.values()), DOCUMENTED)
    listed = {part for name, _ in ROWS for part in name.split(".")}
    unlisted = {
        f"{file.relative_to(ROOT)}: {name}"
        for file, tree in trees.items()
        for name in private_names(tree) - own - listed
    }
    assert not unlisted
