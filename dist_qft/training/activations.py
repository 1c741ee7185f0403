"""Activations kept for the backward pass: what is not cheap to make, or of some layers their inputs alone."""

import torch
from transformers import PreTrainedModel

from dist_qft.config.train_schema import TrainConfig
from dist_qft.errors import UserError
from dist_qft.methods.trainable import TrainableSet
from dist_qft.ranks.collectives import everywhere


def choose_activations(
    model: PreTrainedModel, trainables: TrainableSet, train: TrainConfig, device: torch.device
) -> None:
    """Have the layers that `train` names compute their activations again in backward, in training mode alone.

    Where it names none, adapters still keep no input that is cheap to make again. Not both: a checkpoint hands out
    what it has computed again only once.

    Raises:
        UserError: on all ranks: activations are to be kept in host memory on a CPU, or the model cannot do it.
    """
    if not train.gradient_checkpointing:
        trainables.make_inputs_again()
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
