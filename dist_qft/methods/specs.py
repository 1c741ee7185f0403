"""The door to the methods: from a config, or from a checkpoint, to the spec of what trains beside a base."""

from typing import Any

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.factors import EXACT_METHODS
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.adapter_spec import AdapterSpec, adapter_spec, stored_adapters
from dist_qft.methods.adapters.exact_fold import folding_obstacle
from dist_qft.methods.qst.spec import SideSpec, side_network_spec, stored_side_network
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.storage.checkpoint import Checkpoint


def make_spec(config: RunConfig, base: BaseModel) -> TrainableSpec[Any]:
    """What the config's method trains beside this base; from shapes alone. UserError if it does not fit."""
    if config.method.name == "qst":
        return side_network_spec(config.method, base)
    return adapter_spec(config.method, base)


def merge_warnings(config: RunConfig, spec: TrainableSpec[Any], base: BaseModel) -> list[str]:
    """A line if the method is made for an exact merge and this base or these tiles do not allow one."""
    if config.method.name not in EXACT_METHODS or not isinstance(spec, AdapterSpec):
        return []
    obstacle = folding_obstacle(spec.tiles, base.linears)
    return [f"method.name: {config.method.name} will not merge exactly: {obstacle}"] if obstacle else []


def stored_spec(checkpoint: Checkpoint, base: BaseModel) -> TrainableSpec[Any]:
    """What a checkpoint holds, to be put beside this base. UserError if it is nothing of ours or does not fit."""
    stored, where = checkpoint.adapter_config, str(checkpoint.path)
    match stored.get("peft_type"):
        case AdapterSpec.peft_type:
            return stored_adapters(stored, where)
        case SideSpec.peft_type:
            return stored_side_network(stored, base, where)
        case other:
            allowed = f"'{AdapterSpec.peft_type}' or '{SideSpec.peft_type}'"
            raise UserError(f"{where}: peft_type is '{other}', need {allowed}")
