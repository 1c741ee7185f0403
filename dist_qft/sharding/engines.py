"""The door to the engines: from a name, or a config, to an `Engine`. A new engine is one more entry of `ENGINES`."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from dist_qft.config.schema import RunConfig
from dist_qft.config.section import changed
from dist_qft.errors import UserError
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.fsdp import FsdpEngine
from dist_qft.sharding.replicated import ReplicatedEngine
from dist_qft.sharding.zero import ZeroEngine


class EngineClass(Protocol):
    """A class whose objects are engines."""

    settings: frozenset[str]
    packages: tuple[str, ...]

    def __call__(self, *args: Any, **options: Any) -> Engine: ...

    def from_config(self, config: RunConfig) -> Engine: ...


# `sharding.engine` -> its class. No class imports a package of its own before `Engine.start`.
ENGINES: dict[str, EngineClass] = {"fsdp": FsdpEngine, "zero": ZeroEngine, "replicated": ReplicatedEngine}


def engine_of(config: RunConfig) -> Engine:
    """The engine that `config.sharding` asks for, with its settings there."""
    return _class_of(config.sharding.engine).from_config(config)


def engine_warnings(config: RunConfig) -> list[str]:
    """Lines on settings of `config.sharding` that are changed but belong to other engines than the one chosen."""
    sharding, own = config.sharding, _class_of(config.sharding.engine).settings
    others = frozenset[str]().union(*(engine.settings for engine in ENGINES.values())) - own
    return [
        f"sharding.{name}: no effect with engine {sharding.engine}"
        for name in type(sharding).model_fields
        if name in others and changed(sharding, name)
    ]


def package_versions(config: RunConfig) -> str:
    """The packages that compute a run and their versions, which must be the same on all its ranks."""
    names = ("dist-qft", "torch", "transformers", *_class_of(config.sharding.engine).packages)
    return ", ".join(f"{name} {_version_of(name)}" for name in names)


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def make_engine(name: str, **options: Any) -> Engine:
    """The engine called `name`; `options` are those of its class, by default the class's own.

    Raises:
        UserError: there is no such engine.
    """
    return _class_of(name)(**options)


def _class_of(name: str) -> EngineClass:
    if name not in ENGINES:
        raise UserError(f"sharding.engine: got '{name}', must be one of {', '.join(ENGINES)}")
    return ENGINES[name]
