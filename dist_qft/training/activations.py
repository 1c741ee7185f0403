"""The activations kept of a forward pass for its backward pass: all, or of some layers their inputs alone."""

import torch
from transformers import PreTrainedModel

from dist_qft.config.train_schema import TrainConfig
from dist_qft.errors import UserError
from dist_qft.ranks.collectives import everywhere


def checkpoint_activations(model: PreTrainedModel, train: TrainConfig, device: torch.device) -> None:
    """Have the layers that `train` names compute their activations again in backward, in training mode alone.

    Raises:
        UserError: on all ranks: activations are to be kept in host memory on a CPU, or the model cannot do it.
    """
    if not train.gradient_checkpointing:
        return
    if train.offload_activations and device.type == "cpu":
        raise everywhere(UserError("train.offload_activations: on a CPU they are in host memory already; remove it"))
    if not model.supports_gradient_checkpointing:
        kind = model.config.model_type
        raise everywhere(UserError(f"train.gradient_checkpointing: model type '{kind}' has no support for it"))
    model.activation_checkpointing_enable(
        {"use_reentrant": False},
        every_n_layers=train.checkpoint_every_n_layers,
        offload=train.offload_activations,
    )
    # transformers makes the embedding's output require a gradient, which only reentrant checkpointing needs.
    model.disable_input_require_grads()
    model.train()
