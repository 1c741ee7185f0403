"""The seconds of an optimizer step on a machine with given figures: an estimate from products and bytes alone.

A micro-batch takes the longer of computing and gathering where the engine gathers ahead (FSDP2), else their sum. The
reduction of the gradients and the optimizer follow; the part of the reduction that hides behind backward is not
subtracted, nor are launches, data and the time in which kernels reach less than `Machine.efficiency` counted.
"""

from dataclasses import dataclass

from dist_qft.training.machine import Machine
from dist_qft.training.model_sizes import ModelSizes


@dataclass(frozen=True)
class StepWork:
    """The work of one rank in one step.

    Attributes:
        tokens: of a micro-batch.
        row: tokens of a row, which attend to each other.
        accumulation: micro-batches.
        trainable: parameters.
        backward: gradients flow back through the base.
        again: forward passes that are computed twice (gradient checkpointing), as a share of the layers.
        gathered: bytes that a rank receives of the base in a micro-batch.
        gathered_between, reduced_between: bytes into a node from others, in a micro-batch and in a step.
        reduced: bytes that a rank receives for the gradients in a step.
        optimizer: bytes that the update reads and writes.
        ahead: gathers run while another layer computes.
    """

    tokens: int
    row: int
    accumulation: int
    trainable: int
    backward: bool
    again: float
    gathered: int
    gathered_between: int
    reduced_between: int
    reduced: int
    optimizer: int
    ahead: bool


def step_seconds(machine: Machine, sizes: ModelSizes, work: StepWork) -> dict[str, float]:
    """Seconds by part: compute and gather of all micro-batches, reduce, optimizer, and the whole step."""
    compute = work.accumulation * _compute(machine, sizes, work)
    gather = work.accumulation * max(
        work.gathered / machine.inside_gb_per_s / 1e9, work.gathered_between / machine.between_gb_per_s / 1e9
    )
    reduce = max(work.reduced / machine.inside_gb_per_s, work.reduced_between / machine.between_gb_per_s) / 1e9
    optimizer = work.optimizer / machine.memory_gb_per_s / 1e9
    passes = max(compute, gather) if work.ahead else compute + gather
    parts = {"compute": compute, "gather": gather, "reduce": reduce, "optimizer": optimizer}
    return {**parts, "step": passes + reduce + optimizer}


def _compute(machine: Machine, sizes: ModelSizes, work: StepWork) -> float:
    """Seconds of a micro-batch: its products, and the weights that are unpacked for each pass and read again."""
    passes = 1 + work.backward + work.again
    attention = 2 * work.row * sizes.hidden * sizes.layers  # scores and values of the causal half, per token
    layers = passes * (2 * sizes.active + attention)
    head = (1 + work.backward) * 2 * sizes.head
    flops = work.tokens * (layers + head + 6 * work.trainable)
    moved = passes * (sizes.packed + 2 * sizes.itemsize * sizes.weights)
    return flops / (machine.tflops * 1e12 * machine.efficiency) + moved / (machine.memory_gb_per_s * 1e9)
