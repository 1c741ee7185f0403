"""The costs of a run: time of its parts, and memory split as the QST paper splits it."""

import torch
from torch import Tensor, nn

from dist_qft.training.training_run import TrainingRun
from dist_qft.tuned_model.assemble import make_forward

_OPTIMIZER_BYTES = 16  # of a float32 trainable under Adam: value, gradient, two moments


def costs_of(run: TrainingRun) -> dict[str, float]:
    """Seconds of a step and of the evaluations here, rows that are trained on, and bytes.

    The bytes are those of the weights, of the optimizer, and of what is kept for the backward pass.
    The last is measured by one forward pass, for a whole base in one process alone.
    """
    costs: dict[str, float] = {}
    if (seconds := run.meter.seconds_per_step) is not None:
        costs["seconds_per_step"] = round(seconds, 4)
    for which in ("base", "tuned"):
        held_out = getattr(run.evaluations, which)
        if held_out is not None and held_out.seconds:
            costs[f"{which}_evaluation_seconds"] = round(held_out.seconds, 3)
    costs["train_rows"] = len(run.inputs.data.train)
    costs["weight_bytes"] = run.parts.engine.resident_bytes()
    costs["optimizer_bytes"] = _OPTIMIZER_BYTES * run.flat.count
    if run.world.world_size == 1 and run.parts.engine.name == "replicated":
        costs["activation_bytes"] = activation_bytes(run)
    return costs


def activation_bytes(run: TrainingRun) -> int:
    """Bytes that autograd keeps for the backward pass of the run's first micro-batch; weights do not count."""
    inputs, parts = run.inputs, run.parts
    forward = make_forward(run.config, parts, inputs.spec, inputs.data.train, inputs.device)
    batch = run.batches.micro_batches(0)[0].to(inputs.device)
    trainables = run.flat.values.untyped_storage().data_ptr()
    kept: dict[int, int] = {}  # bytes by storage; all are alive at once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() != trainables:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation's own result would hold the operation, and so itself, for ever

    parts.trainables.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), parts.fixed():
        forward.begin_step([batch])
        loss = parts.task.loss(forward(batch), batch).loss
    parts.trainables.eval()
    del loss
    return sum(kept.values())
