"""What trains beside a base: from the config, or from a checkpoint, to a plan of trainables. The family's door."""

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.adapter_plan import AdapterPlan, stored_adapters
from dist_qft.methods.adapters.exact_fold import folding_obstacle
from dist_qft.methods.adapters.schedule import LinearShape, plan_adapters
from dist_qft.methods.qst.plan import SidePlan, plan_side_network, stored_side_network
from dist_qft.methods.trainable import Plan
from dist_qft.storage.checkpoint import Checkpoint


def linear_shapes(base: BaseModel) -> list[LinearShape]:
    """The base's linear layers as the method's schedule sees them, in model order."""
    return [
        LinearShape(path, layer.in_features, layer.out_features, base.depth_of(path))
        for path, layer in base.linears.items()
    ]


def plan_trainables(config: RunConfig, base: BaseModel) -> Plan:
    """What the config's method trains beside this base; from shapes alone. UserError if it does not fit."""
    if config.method.name == "qst":
        return plan_side_network(config.method, base)
    plan = AdapterPlan(plan_adapters(config.method, linear_shapes(base)))
    if config.method.merge_aware and (obstacle := folding_obstacle(plan, base.linears)):
        raise UserError(f"method.merge_aware: no exact merge: {obstacle}")
    return plan


def stored_plan(checkpoint: Checkpoint, base: BaseModel) -> Plan:
    """What a checkpoint holds, to be put beside this base. UserError if it is nothing of ours or does not fit."""
    stored, where = checkpoint.adapter_config, str(checkpoint.path)
    match stored.get("peft_type"):
        case AdapterPlan.peft_type:
            return stored_adapters(stored, where)
        case SidePlan.peft_type:
            return stored_side_network(stored, base, where)
        case other:
            allowed = f"'{AdapterPlan.peft_type}' or '{SidePlan.peft_type}'"
            raise UserError(f"{where}: peft_type is '{other}', need {allowed}")
