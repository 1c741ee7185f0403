"""The door to the methods: from a config, or from a checkpoint, to the spec of the trainables beside a base.

A method of another kind than those here adds a line to `KINDS`. A tile method needs none: it is settings of an adapter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.methods.method import MethodConfig
from dist_qft.config.methods.qst import QstConfig
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.adapter_spec import AdapterSpec, adapter_spec, stored_adapters
from dist_qft.methods.adapters.trained_tokens import trained_tokens
from dist_qft.methods.qst.spec import SideSpec, side_network_spec, stored_side_network
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Kind:
    """A kind of trainables.

    Attributes:
        make: from the `method` section and a base to the spec. UserError if they do not fit.
        read: from the `adapter_config.json` that the spec described, the base, and the file's name for messages.
    """

    spec: type[TrainableSpec[Any]]
    make: Callable[[Any, BaseModel], TrainableSpec[Any]]
    read: Callable[[Mapping[str, Any], BaseModel, str], TrainableSpec[Any]]


# By the class of the config section; a subclass is of its base class's kind.
KINDS: dict[type[MethodConfig], Kind] = {
    TileMethod: Kind(AdapterSpec, adapter_spec, lambda stored, base, where: stored_adapters(stored, where)),
    QstConfig: Kind(SideSpec, side_network_spec, stored_side_network),
}


def make_spec(config: RunConfig, base: BaseModel) -> TrainableSpec[Any]:
    """The spec of the config's trainables beside this base, from shapes alone. UserError if it does not fit."""
    kind = next(kind for section, kind in KINDS.items() if isinstance(config.method, section))
    spec = kind.make(config.method, base)
    if isinstance(spec, AdapterSpec) and config.method.tokens_to_train:
        return replace(spec, tokens=trained_tokens(config, base))
    return spec


def stored_spec(checkpoint: Checkpoint, base: BaseModel) -> TrainableSpec[Any]:
    """The spec of a checkpoint's trainables beside this base. UserError if it is not ours or does not fit."""
    stored, where = checkpoint.adapter_config, str(checkpoint.path)
    kinds = {kind.spec.peft_type: kind for kind in KINDS.values()}
    kind = kinds.get(str(stored.get("peft_type")))
    if kind is None:
        raise UserError(f"{where}: peft_type: got '{stored.get('peft_type')}', must be {' or '.join(kinds)}")
    return kind.read(stored, base, where)
