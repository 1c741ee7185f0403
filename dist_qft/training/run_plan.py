"""The plan of a run as data: the parameters trained, the bytes held and the bytes moved. `dist_qft.plan` works it out
and prints it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PlannedModel:
    """The base.

    Attributes:
        path: as the config names it.
        type: the family, as in the model's config.json.
        compute_dtype: such as "bfloat16".
    """

    path: str
    type: str
    decoder_layers: int
    vocab_size: int
    compute_dtype: str


@dataclass(frozen=True)
class PlannedBatch:
    """The rows of an optimizer step: global = per device x ranks x accumulation.

    Attributes:
        max_length: tokens of a row at most; None without data.
        unit: rows, or pairs or rated answers, of which each is up to two rows of so many tokens.
    """

    global_batch_size: int
    per_device_train_batch_size: int
    accumulation_steps: int
    max_length: int | None
    unit: str = "rows"


@dataclass(frozen=True)
class PlannedOptimization:
    """The optimizer and its schedule.

    Attributes:
        max_steps, num_train_epochs: the length; the one that does not count is None.
        warmup_steps: None if it depends on the number of data rows.
    """

    optim: str
    learning_rate: float
    lr_scheduler_type: str
    max_steps: int | None
    num_train_epochs: float | None
    warmup_steps: int | None
    max_grad_norm: float | None
    weight_decay: float


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run on `world_size` ranks.

    N below is `shard_group`, the ranks that hold one base together (`sharding.group`).

    Attributes:
        trainable_parameters: the adapters' or the side network's, and those of the task's own head.
        trainable_parameters_by_layer_type, trainable_parameters_by_depth: without that head.
        trainables: the kind of `adapters`, a table with one row for each kind of adapter or part.
        base_bytes: the packed base.
        base_bytes_per_rank: the bytes that the fullest rank holds, as the engine cuts each packed tensor.
        base_formats: a table with one row for each format, and one for the tensors that have none.
        gather_bytes_per_micro_batch: the bytes that one rank receives: (N-1)/N * (embedding + LM head + 2 * rest), the
            rest once if the engine does not gather it again in backward. A tied table counts once, the LM head not at
            all if the task has a head of its own. Where no gradient flows back through the base (qst) the rest counts
            once, or not at all if the engine keeps it gathered. 0 with `replicated`.
        gather_bytes_per_step: that times the accumulation steps.
        reduce_bytes_per_step: the fp32 gradient buffer without its small header: 4 * trainable parameters, and padding
            where the optimizer is spread over the ranks.
        collective_bytes_per_step: the tensors of all collectives over the trainables; see `planned_reduction`.
        between_nodes: bytes that come into each node from others; see `links.between_nodes`.
        optimizer_bytes: the optimizer's state on each rank.
        optimizer_ranks: ranks that share the optimizer's state; 1 if each holds all of it (`train.shard_optimizer`).
        checkpoint_bytes: trainables (fp32) and optimizer state.
        memory: bytes on the fullest rank at its peak, by part; see `memory_plan`.
        peak_bytes: their sum.
        load_peak_bytes: the same while the base is read, before anything is trained.
        memory_limit: bytes that a rank may use; None if nobody said.
        fits: whether the peak is within the limit; None without one.
        remedy: overrides with which the run would fit; None if it does, or if none is known.
        hardware, seconds_per_step: a machine's name, and the time of a step on it by part; None if nobody asked.
    """

    model: PlannedModel
    method: str
    engine: str
    world_size: int
    nodes: int
    shard_group: int
    trainable_parameters: int
    trainable_parameters_by_layer_type: dict[str, int]
    trainable_parameters_by_depth: list[int]
    trainables: str
    adapters: list[dict[str, Any]]
    base_bytes: int
    base_bytes_per_rank: int
    base_formats: list[dict[str, Any]]
    gather_bytes_per_micro_batch: int
    gather_bytes_per_step: int
    reduce_bytes_per_step: int
    collective_bytes_per_step: dict[str, int]
    between_nodes: dict[str, int]
    optimizer_bytes: int
    optimizer_ranks: int
    checkpoint_bytes: int
    batch: PlannedBatch
    optimization: PlannedOptimization
    warnings: list[str]
    memory: dict[str, int]
    peak_bytes: int
    load_peak_bytes: int
    memory_limit: int | None
    fits: bool | None
    remedy: str | None
    hardware: str | None = None
    seconds_per_step: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, under the same names."""
        return asdict(self)
